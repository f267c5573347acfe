import torch

from ddpm_fast.kernels.calling import target


def test_a_chips_number_is_a_constant_of_a_compiled_graph(monkeypatch):
    asked = []

    def capability(index):
        asked.append(index)
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)

    def scaled(x):
        return x * target.arch_of(torch.device("cuda:1"))

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [90.0, 90.0]
    compiled(torch.ones(2))
    assert asked == [1]  # when it was traced, and never again


def test_the_interpreter_takes_one_chips_numbers():
    assert target.arch_of(torch.device("cpu")) == target.INTERPRETED_ARCH
