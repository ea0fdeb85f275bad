"""Files that hold something else than what was written: they are read as records, or refused in one sentence."""

import copy
import dataclasses
import json
import os
import time

import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment.files import SETTINGS, SWEEP
from purejaxppo.experiment.provenance import as_json, describe_machine
from purejaxppo.experiment.records import OtherVersion
from purejaxppo.experiment.runs.launch import Launch, read_launch
from purejaxppo.experiment.runs.settings import RunSession, RunSettings, read_settings
from purejaxppo.experiment.sweeps.slices import SweepSession, read_sessions, read_sweep

MACHINE = describe_machine()
RUN_SESSION: RunSession = {**MACHINE, "identity": {}}
SWEEP_SESSION: SweepSession = {**MACHINE, "identities": {}}
DEFAULTS = pjp.Hyperparams()


def make_settings():
    return RunSettings(
        env="CartPole-v1",
        config=SMALL,
        hyperparams={name: as_json(DEFAULTS.get(name)) for name in DEFAULTS.names} | {"extra.beta": 0.5},
        env_params={"gravity": 9.8, "max_steps_in_episode": 500},
        num_runs=2,
        first_key=[[1, 2], [3, 4]],
        notes={"launch": dataclasses.asdict(Launch(2))},
        slice_size=1,
        sessions=(RUN_SESSION,),
        num_updates_done=3,
        compile_seconds=1.5,
    )


def plain(settings):
    """The settings with lists for the tuples in their notes, as JSON has them."""
    return dataclasses.replace(settings, notes=json.loads(json.dumps(settings.notes)))


def make_sweep():
    table = pjp.grid(target_kl=[float("inf"), 0.1], widths=[(8,), (8, 8)]) * pjp.paired(clip=[0.1], env=["CartPole-v1"])
    return pjp.Sweep("CartPole-v1", table, 2, config=SMALL, hyperparams=DEFAULTS)


def read_run(folder):
    settings = read_settings(folder)
    assert settings.to_hyperparams() and settings.constants() and read_launch(settings, folder)
    return settings


def read_whole_sweep(folder):
    return read_sweep(folder), read_sessions(folder)


# Name of the file, its data, and what reads it.
FILES = {
    "run": (SETTINGS, make_settings().to_json(), read_run),
    "sweep": (SWEEP, {"sweep": make_sweep().to_json(), "sessions": [SWEEP_SESSION]}, read_whole_sweep),
}
DAMAGES = {
    "empty": "", "null": "null", "a list": "[]", "half": '{"env": "Cart', "nested": "[" * 10**5, "number": "1" * 5000,
    "nothing": "{}", "nan": "NaN", "binary": "\x00\x01", "a number": "7", "a folder": {"env": {"env": []}},
}  # fmt: skip


def write(folder, kind, data):
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / FILES[kind][0]).write_text(text)


def leaves(data, path=()):
    """The paths of all entries of nested dictionaries and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def mutate(data, path, value):
    """The data with another value at a path, or without it."""
    data = copy.deepcopy(json.loads(json.dumps(data)))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value == "delete":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize("kind", FILES)
def test_a_record_is_read_as_it_was_written(kind, tmp_path):
    write(tmp_path, kind, FILES[kind][1])
    found = FILES[kind][2](tmp_path)
    assert found == (plain(make_settings()) if kind == "run" else (make_sweep(), [SWEEP_SESSION]))


@pytest.mark.filterwarnings("ignore:.*lacks")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("value", ["delete", None, "word", -1, 1e308, [], {}, 10**30])
def test_any_other_value_anywhere_is_read_or_refused_in_one_sentence(kind, value, tmp_path):
    _, data, read = FILES[kind]
    start, refused = time.monotonic(), 0
    for path in leaves(data):
        write(tmp_path, kind, mutate(data, path, value))
        try:
            read(tmp_path)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error), path
    assert refused > 20 and time.monotonic() - start < 20


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_record_is_refused_in_one_sentence(kind, damage, tmp_path):
    write(tmp_path, kind, DAMAGES[damage])
    with pytest.raises(ValueError, match=f"^{tmp_path}.*is damaged: [^\n]*$"):
        FILES[kind][2](tmp_path)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "make",
    [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()],
    ids=["pipe", "device", "folder"],
)
def test_only_regular_files_are_opened(kind, make, tmp_path):
    make(tmp_path / FILES[kind][0])
    with pytest.raises(ValueError, match="is damaged: it is not a regular file"):
        FILES[kind][2](tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / SETTINGS, "wb") as file:
        file.truncate(2**40)  # of nothing: it takes no room
    with pytest.raises(ValueError, match="is damaged: it has more than 67,108,864 bytes"):
        read_settings(tmp_path)


PLACES = {
    "run": [("config", "entropy_floor"), ("hyperparams", "warmth"), ("plugged",)],
    "sweep": [("sweep", "config", "entropy_floor"), ("sweep", "hyperparams", "warmth"), ("sweep", "plugged")],
}


@pytest.mark.parametrize("kind, path", [(kind, path) for kind, paths in PLACES.items() for path in paths])
def test_what_another_version_added_is_told_with_both_versions(kind, path, tmp_path):
    data = mutate(FILES[kind][1], path, 1)
    write(tmp_path, kind, data)
    with pytest.raises(ValueError, match=f"is damaged: the key '.*{path[-1]}' is not known"):
        FILES[kind][2](tmp_path)
    write(tmp_path, kind, mutate(data, ("sessions", 0, "versions", "purejaxppo"), "9.9"))
    words = f"purejaxppo 9.9 wrote it, this is {pjp.__version__}, and the key '.*{path[-1]}' is not known"
    with pytest.raises(OtherVersion, match=words):
        FILES[kind][2](tmp_path)


@pytest.mark.parametrize("kind, inner", [("run", ()), ("sweep", ("sweep",))])
def test_what_a_version_did_not_have_yet_has_its_default(kind, inner, tmp_path):
    data = mutate(FILES[kind][1], (*inner, "config", "matmul_precision"), "delete")
    write(tmp_path, kind, mutate(data, (*inner, "hyperparams", "adam_b2"), "delete"))
    with pytest.warns(UserWarning, match="lacks config.matmul_precision, hyperparams.adam_b2: the defaults are used"):
        found = FILES[kind][2](tmp_path)
    assert found == plain(make_settings()) if kind == "run" else found[0] == make_sweep()
