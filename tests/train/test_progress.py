import json


def test_a_reader_that_leaves_does_not_stop_the_run(tiny, start_command, tmp_path):
    run = tmp_path / "run"
    process = start_command(*tiny, "--iterations", 30, "--log-every", 1, "--run-dir", run)
    process.stdout.readline()
    process.stdout.close()  # as `train | head -1` does
    assert process.wait(timeout=120) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert (run / "checkpoints" / "step_00000030" / "manifest.json").exists()
    assert "finished 30 steps" in (run / "log.txt").read_text()
