"""Whatever a checkpoint's files become, reading them gives the checkpoint or one line."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import OWN_DIGEST, CheckpointError
from tests.checkpoint_states import parts

WORDS = st.text(max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, 1, parts(1), {"seed": 5}, keep=1)


def reads_or_refuses(folder):
    try:
        assert checkpoint.load(folder).parts
    except CheckpointError as error:
        assert str(error) and "\n" not in str(error)


def test_a_manifest_with_bytes_changed_or_cut(saved):
    path = saved / "manifest.json"
    whole = path.read_bytes()

    @FUZZ
    @given(
        st.lists(
            st.tuples(st.integers(0, len(whole)), st.binary(min_size=1, max_size=6)), max_size=4
        ),
        st.integers(0, len(whole)) | st.none(),
    )
    def check(changes, cut):
        data = bytearray(whole)
        for at, new in changes:
            data[at : at + len(new)] = new
        path.write_bytes(data[:cut])
        reads_or_refuses(saved)

    check()


def test_a_manifest_of_other_values_without_its_own_digest(saved):
    """The first version's manifests have none, so nothing but their values can be checked."""
    path = saved / "manifest.json"
    values = json.loads(path.read_bytes())
    del values[OWN_DIGEST]
    names = st.sampled_from([*values["files"], "", ".", "..", "a\0b", "\ud800", "x" * 999])
    file = st.fixed_dictionaries({"bytes": st.integers(-1, 2**70), "sha256": WORDS})

    @FUZZ
    @given(st.one_of(
        st.dictionaries(names, file | JSON, max_size=3).map(lambda files: {"files": files}),
        st.builds(lambda key, value: {key: value}, st.sampled_from(list(values)), JSON),
    ))  # fmt: skip
    @example({"files": {"a\0b": {"bytes": 1, "sha256": ""}}})
    @example({"files": {"\ud800": {"bytes": 1, "sha256": ""}}})
    @example({"files": {"": {"bytes": 1, "sha256": ""}}})
    def check(change):
        path.write_text(json.dumps(values | change))
        try:
            checkpoint.load(saved)
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)

    check()


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"format": ' + "9" * 10**4 + "}", "null", '"', "\0"]
)
def test_a_manifest_that_is_no_object(saved, text):
    (saved / "manifest.json").write_text(text)
    reads_or_refuses(saved)


def test_a_part_with_bytes_changed_that_its_manifest_vouches_for(saved, tmp_path):
    import hashlib

    part, manifest = saved / "model.safetensors", saved / "manifest.json"
    whole, values = part.read_bytes(), json.loads(manifest.read_bytes())
    del values[OWN_DIGEST]

    @FUZZ
    @given(
        st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=6)), max_size=4),
        st.integers(0, len(whole)) | st.none(),
    )
    def check(changes, cut):
        data = bytearray(whole)
        for at, new in changes:
            data[at : at + len(new)] = new
        data = bytes(data[:cut])
        part.write_bytes(data)
        recorded = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(values | {"files": values["files"] | {part.name: recorded}}))
        reads_or_refuses(saved)

    check()
    shutil.rmtree(saved)
