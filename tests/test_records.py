"""Files that hold something else than what was written: they are read as records, or refused in one sentence."""

import copy
import dataclasses
import io
import json
import os
import shutil
import time
import zipfile

import jax
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.cli.main import main
from purejaxppo.experiment.files import SETTINGS, SWEEP, ArrayFile, from_arrays, save_arrays, save_json
from purejaxppo.experiment.provenance import as_json, describe_machine
from purejaxppo.experiment.records import OtherVersion
from purejaxppo.experiment.runs.launch import Launch, read_launch
from purejaxppo.experiment.runs.settings import (
    ENV_PARAMS,
    RunSession,
    RunSettings,
    describe_param,
    read_settings,
    write_env_params,
    write_settings,
)
from purejaxppo.experiment.sweeps.claims import Claims
from purejaxppo.experiment.sweeps.slices import (
    Division,
    Slice,
    Slices,
    SweepSession,
    read_division,
    read_sessions,
    read_sweep,
)

MACHINE = describe_machine()
RUN_SESSION: RunSession = {**MACHINE, "identity": {}}
SWEEP_SESSION: SweepSession = {**MACHINE, "identities": {}}
DIVISION = Division({'{"env": "CartPole-v1", "widths": [8]}': 2}, 8, ["0123456789abcdef"])
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


def test_a_notebook_keeps_no_names_of_files_that_its_kernel_was_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/lib/python3/ipykernel_launcher.py", "-f", "/run/user/1/kernel-7.json"])
    assert describe_machine()["command"] == ["notebook"]
    for words in (["train.py", "-f", "x"], [""], []):
        monkeypatch.setattr("sys.argv", words)
        assert describe_machine()["command"] == words


def test_the_command_is_kept_without_passwords(monkeypatch):
    url = "postgresql+psycopg://me:{}@host:5432/trials"
    monkeypatch.setattr("sys.argv", ["purejaxppo", "--storage", url.format("se:cr/et"), "--x=" + url.format("secret")])
    assert describe_machine()["command"][2:] == [url.format("***"), "--x=" + url.format("***")]
    monkeypatch.setattr("sys.argv", ["purejaxppo", "train", "runs/a:b@c"])
    assert describe_machine()["command"] == ["purejaxppo", "train", "runs/a:b@c"]


def make_sweep():
    table = pjp.grid(target_kl=[float("inf"), 0.1], widths=[(8,), (8, 8)]) * pjp.paired(clip=[0.1], env=["CartPole-v1"])
    return pjp.Sweep("CartPole-v1", table, 2, config=dataclasses.replace(SMALL, stop_on_kl=True), hyperparams=DEFAULTS)


def read_run(folder):
    settings = read_settings(folder)
    assert settings.to_hyperparams() and settings.constants() and read_launch(settings, folder)
    return settings


def read_whole_sweep(folder):
    return read_sweep(folder), read_sessions(folder), read_division(folder)


# Name of the file, its data, and what reads it.
FILES = {
    "run": (SETTINGS, make_settings().to_json(), read_run),
    "sweep": (
        SWEEP,
        {"sweep": make_sweep().to_json(), "sessions": [SWEEP_SESSION], "division": dataclasses.asdict(DIVISION)},
        read_whole_sweep,
    ),
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
    assert found == (plain(make_settings()) if kind == "run" else (make_sweep(), [SWEEP_SESSION], DIVISION))


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


def make_params(num_runs):
    """Parameters of an environment: numbers, one per run, a large table that all share, and one that differs."""
    table = np.random.default_rng(0).random(300_000, np.float32)
    params = {"gain": 2.0, "steps": 500, "fast": True, "table": table, "small": np.arange(3, dtype=np.int32)}
    if num_runs:
        params = jax.tree.map(lambda x: np.broadcast_to(x, (num_runs, *np.shape(x))), params)
        params |= {"mass": np.arange(num_runs, dtype=np.float32), "own": np.arange(num_runs * 70).reshape(num_runs, 70)}
    return jax.tree.map(lambda x: np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)), params)


@pytest.mark.parametrize("num_runs", [None, 2])
def test_large_parameters_of_an_environment_are_kept_once_beside_the_settings(num_runs, tmp_path):
    params = make_params(num_runs)
    described = {name: describe_param(x, num_runs) for name, x in params.items()}
    key = [[1, 2]] * num_runs if num_runs else [1, 2]
    settings = dataclasses.replace(make_settings(), env_params=described, num_runs=num_runs, first_key=key, notes={})
    write_env_params(tmp_path, settings, params)
    write_settings(tmp_path, settings)
    assert (tmp_path / SETTINGS).stat().st_size < 10_000 and (tmp_path / ENV_PARAMS).stat().st_size < 1_210_000
    again = read_settings(tmp_path)
    found = again.to_env_params(params, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert again.constants() == settings.constants()
    older = dataclasses.replace(settings, env_params={name: as_json(x) for name, x in params.items()})
    assert older.constants() == settings.constants()
    jax.tree.map(np.testing.assert_array_equal, older.to_env_params(params, tmp_path), params)
    save_arrays(tmp_path / ENV_PARAMS, {"table": np.zeros(300_000, np.float32)})
    with pytest.raises(ValueError, match="env_params.npz is damaged: (table|own) is not what settings.json says"):
        again.to_env_params(params, tmp_path)


@pytest.mark.parametrize("value", [None, "word", [1.0, 2.0, 3.0], 10**30, "inf", 0.5])
def test_a_parameter_that_does_not_fit_the_environment_is_named(value, tmp_path):
    settings = dataclasses.replace(make_settings(), env_params={"steps": value})
    with pytest.raises(ValueError, match=r"parameter steps should be int32 \[2\], found"):
        settings.to_env_params({"steps": np.zeros(2, np.int32)}, tmp_path)


ARRAYS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}
LIKE = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in ARRAYS.items()}


def member(shape, data=b"", dtype="<f4"):
    """An array in an .npz file whose header says what it likes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def replace_member(path, name, data, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as file:
        others = {x: file.read(x) for x in file.namelist() if x != name}
    with zipfile.ZipFile(path, "w") as file:
        for other, x in others.items():
            file.writestr(other, x)
        file.writestr(name, data, how)


def read_policy(path):
    with ArrayFile(path) as arrays:
        return from_arrays(arrays, LIKE, str(path))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: replace_member(path, "weight.npy", member((10**13,))), "has 128 bytes, which are not float32"),
        (lambda path: replace_member(path, "weight.npy", member((-2, -3), bytes(24))), "does not fit"),
        (lambda path: replace_member(path, "weight.npy", member((2, 3), bytes(24), "|O")), "damaged"),
        (
            lambda path: replace_member(path, "weight.npy", member((2, 3), bytes(24)), zipfile.ZIP_DEFLATED),
            "compressed",
        ),
        (lambda path: replace_member(path, "weight.npy", b"weights"), "damaged"),
        (
            lambda path: replace_member(path, "weight.npy", member((10**5,), bytes(4 * 10**5))),
            r"found float32 \[100000\]",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes().replace(ARRAYS["bias"].tobytes(), bytes(12))), "CRC"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a regular file"),
    ],
)
def test_arrays_are_read_only_if_they_are_what_is_expected(change, words, tmp_path):
    path = tmp_path / "policy.npz"
    save_arrays(path, ARRAYS)
    change(path)
    with pytest.raises(ValueError, match=f"^{path}.*{words}[^\n]*$"):
        read_policy(path)


def test_a_further_array_is_not_read(tmp_path):
    path = tmp_path / "policy.npz"
    save_arrays(path, ARRAYS)
    replace_member(path, "more.npy", bytes(10**8), zipfile.ZIP_DEFLATED)
    jax.tree.map(np.testing.assert_array_equal, read_policy(path), ARRAYS)


@pytest.fixture
def slices(tmp_path):
    """The slices of a sweep of four runs, two in each; every number is that of its setting."""
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1, 0.2]), 2, config=SMALL, hyperparams=DEFAULTS)
    slices, names = Slices(sweep, tmp_path), list(sweep.runs())
    save_json(tmp_path / SWEEP, {"sweep": sweep.to_json(), "sessions": [SWEEP_SESSION]})
    (tmp_path / "slices").mkdir()
    for i in range(2):
        metrics = {
            name: np.full((2, 3), i + 1, np.float32) for name in ("learning_rate", "episode_return", "num_episodes")
        }
        state = {"num_updates": np.full(2, 3, np.int32), "weight": np.full((2, 5), i, np.float32)}
        slices.write(Slice(tuple(names[2 * i : 2 * i + 2]), metrics, state))
    return slices


def paths_of(slices):
    first, second = (slices._path(slice_.name) for slice_ in sorted(slices.read(), key=lambda x: x.runs))
    return first, second


def exchange(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_a_copy_among_the_slices_changes_nothing_and_is_named(slices):
    first, _ = paths_of(slices)
    shutil.copy(first, first.with_name("0 (conflicted copy).npz"))
    with pytest.warns(UserWarning, match=f"conflicted copy.* holds the runs of {first.name}, and is ignored$"):
        result = pjp.load(slices.folder)
    assert isinstance(result, pjp.SweepResult) and result.best() == {"clip": 0.2}


@pytest.mark.filterwarnings("ignore:.*is ignored")
def test_slices_whose_contents_were_exchanged_are_neither_used_nor_replaced(slices):
    stored, paths = slices.read(), paths_of(slices)
    exchange(*paths)
    with pytest.warns(UserWarning, match="holds the runs of"):
        assert slices.read() == []
    with pytest.raises(ValueError, match="holds the runs of .*would be replaced"), Claims(slices).claim(stored):
        pass
    with pytest.raises(ValueError, match="holds the runs of"):
        slices.load(paths[0].stem, ["weight"])


def test_a_slice_of_another_sweep_with_the_same_settings_is_ignored(slices, tmp_path):
    other = dataclasses.replace(slices.sweep, seed=1)
    with pytest.warns(UserWarning, match="belongs to another sweep, with seed=0 instead of 1, and is ignored"):
        assert Slices(other, tmp_path).read() == []
    fewer = dataclasses.replace(slices.sweep, table=pjp.grid(clip=[0.1]))
    with pytest.warns(UserWarning, match="belongs to another sweep, with the run .*0.2"):
        assert len(Slices(fewer, tmp_path).read()) == 1


@pytest.mark.parametrize(
    "change", [lambda path: path.write_bytes(path.read_bytes()[:500]), lambda path: path.write_text("")]
)
def test_no_setting_is_called_best_while_the_slice_of_another_is_damaged(slices, change):
    _, second = paths_of(slices)
    change(second)
    with pytest.warns(
        UserWarning, match=f"{second.name} is damaged: .*; running the sweep again trains its runs again"
    ):
        result = pjp.load(slices.folder)
    assert isinstance(result, pjp.SweepResult)
    with pytest.raises(
        ValueError, match=f"best setting is unknown: clip=0.2 seed=0 is missing, .*{second.name} is damaged"
    ):
        result.best()
    with pytest.raises(ValueError, match=f"clip=0.2 seed=1 has not been trained yet or is lost, .*{second.name}"):
        result.state(1, clip=0.2)


def test_the_best_of_a_sweep_with_untrained_runs_is_that_of_the_others(slices):
    paths_of(slices)[1].unlink()
    result = pjp.load(slices.folder)
    assert isinstance(result, pjp.SweepResult)
    with pytest.warns(UserWarning, match="2 of 4 runs have not been trained yet, such as clip=0.2 seed=0; the best"):
        assert result.best() == {"clip": 0.1}


def test_a_slice_with_an_array_of_another_name_is_damaged(slices):
    replace_member(paths_of(slices)[0], "metrics_loss.npy", member((2, 3), bytes(24)))
    with pytest.warns(UserWarning, match="is damaged: 'metrics_loss' does not belong there"):
        assert len(slices.read()) == 1


RUN = ["train", "CartPole-v1", "--num-updates", "2", "--num-seeds", "2"]
SWEEP_OF_TWO = ["sweep", "CartPole-v1", "--num-updates", "2", "--num-seeds", "1", "--grid", "clip=0.1,0.2"]
TINY = "--num-envs 2 --num-steps 4 --num-minibatches 1 --num-epochs 1 --widths 4 --out".split()


@pytest.mark.slow
@pytest.mark.parametrize("kind, begin", [("run", RUN), ("sweep", SWEEP_OF_TWO)])
def test_commands_end_in_success_or_one_sentence_whatever_the_settings_hold(kind, begin, tmp_path, capsys):
    folder, random = tmp_path / "whole", np.random.default_rng(0)
    assert main([*begin, *TINY, str(folder)]) == 0
    data = json.loads((folder / FILES[kind][0]).read_text())
    mutations = [(path, x) for path in leaves(data) for x in ("delete", None, "word", -1, 1e308, [], {}, 10**30)]
    for path, value in (mutations[i] for i in random.permutation(len(mutations))[:60]):
        copied = shutil.copytree(folder, tmp_path / "copy")
        write(copied, kind, mutate(data, path, value))
        for command in (["show"], ["evaluate", "--episodes", "1"], ["plot"], ["resume"]):
            capsys.readouterr()
            status = main([command[0], str(copied), *command[1:]])
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("purejaxppo: ")]
            errors = [line for line in said if not line.startswith("purejaxppo: warning: ")]
            # 4 says that every agent failed, which a value on disk can lead to; 3 would be a full disk.
            assert (status, len(errors)) in ((0, 0), (2, 1), (4, 1)), (path, value, command, said)
        shutil.rmtree(copied)


@pytest.mark.parametrize("width, memory", [(5, "gru"), (0, "")])
def test_the_gru_width_of_older_versions_is_read(width, memory, tmp_path):
    config = dataclasses.replace(SMALL, segment_length=4, memory=memory, memory_width=width or 64)
    older = {"gru_width": width, **{k: x for k, x in dataclasses.asdict(config).items() if "memory" not in k}}
    settings = dataclasses.replace(make_settings(), config=config)
    save_json(tmp_path / SETTINGS, settings.to_json() | {"config": older})
    with pytest.warns(UserWarning, match="lacks .*config.memory_inputs"):
        assert plain(read_settings(tmp_path)) == plain(settings)


@pytest.mark.parametrize("config, table", [({"memory": "lstm"}, {}), ({}, {"memory": ["", "mingru"]})])
def test_a_sweep_over_gru_width_and_another_memory_is_refused(config, table):
    with pytest.raises(ValueError, match=r"sweep over memory_width"):
        pjp.Sweep("CartPole-v1", pjp.grid(gru_width=[0, 5], **table), config=pjp.Config(segment_length=8, **config))


def test_a_sweep_over_the_gru_width_of_older_versions_keeps_the_names_of_its_runs():
    config = dataclasses.replace(SMALL, segment_length=4)
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(gru_width=[0, 5]), 2, config=config, hyperparams=DEFAULTS)
    data = sweep.to_json()
    data["config"] = {"gru_width": 0} | {k: x for k, x in data["config"].items() if "memory" not in k}
    read = pjp.Sweep.from_json(json.loads(json.dumps(data)))
    assert read == sweep and list(read.runs())[3] == '{"gru_width": 5, "seed": 1}'
    assert [(group.config.memory, group.config.memory_width) for group in read.groups()] == [("", 64), ("gru", 5)]
    assert [read.name_group(group) for group in read.groups()] == [
        f"env=CartPole-v1 gru_width={width}" for width in (0, 5)
    ]
