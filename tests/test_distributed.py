"""Processes that know each other: what tells a process its place, and what several of them train together."""

import io

import pytest

from purejaxppo.cli.distributed import _describe_end, _pass_on, words_of
from purejaxppo.experiment.distributed import ALL, Processes, is_first, is_news, read_processes

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-4]"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    "words, environment, expected",
    [
        ("0/2 10.0.0.1:1234", {}, Processes(0, 2, "10.0.0.1:1234")),
        ("[::1]:1234 1/2", SLURM, Processes(1, 2, "[::1]:1234")),
        ("", SLURM, Processes(3, 8, None, 1, "slurm")),
        ("", OPEN_MPI_4, Processes(1, 4, None, 0, "ompi")),
        ("", SLURM | OPEN_MPI_4, Processes(1, 4, None, 0, "ompi")),  # mpirun in a job of SLURM
        ("host:1234", OPEN_MPI, Processes(1, 4, "host:1234", 0)),
        ("host:1234", SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Processes(3, 8, "host:1234")),
        ("", KUBERNETES, Processes(2, None, None, None, "k8s")),
    ],
)
def test_a_process_reads_its_place_from_words_or_from_the_variables_of_a_cluster(words, environment, expected):
    assert read_processes(words.split(), environment) == expected


@pytest.mark.parametrize(
    "words, environment, sentence",
    [
        ("", {}, "finds no variables of SLURM, Open MPI or Kubernetes .give all: 0/2 10.0.0.1:1234"),
        ("0/2", {}, "distributed=0/2 finds no variables"),
        ("2/2 host:1", {}, "distributed=2/2 host:1 must say the index of this process and their number"),
        ("0/2 1/2 host:1", {}, "distributed=0/2 1/2 host:1 must say the index"),
        ("0/2 host", {}, "distributed=0/2 host must say the host and the port"),
        ("0/2 host:70000", {}, "must say the host and the port"),
        ("", {name: SLURM[name] for name in ("SLURM_PROCID", "SLURM_NTASKS")}, "SLURM_STEP_NODELIST.*with srun"),
        ("", OPEN_MPI, "OMPI_MCA_orte_hnp_uri, which is not set here .from version 5 on.*HOST:PORT"),
        ("", SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID, which is not set here"),
        ("host:1234", {"JOB_COMPLETION_INDEX": "2"}, "KUBERNETES_SERVICE_HOST"),
    ],
)
def test_what_does_not_tell_the_place_of_a_process_is_refused_with_the_remedy(words, environment, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_processes(words.split(), environment)


def test_a_process_alone_is_the_first_and_agrees_with_itself():
    assert is_first() and ALL.is_first and ALL.gather("x") == ["x"] and ALL.any(True) and not ALL.any(False)
    assert is_news("a sentence") and is_news("a sentence")


def test_the_words_of_the_flag_end_at_the_next_flag():
    assert words_of(["sweep", "x", "--distributed", "0/2", "h:1", "--seed", "1"]) == ["0/2", "h:1"]
    assert words_of(["sweep", "x", "--distributed"]) == [] and words_of(["--distributed=0/2", "h:1"]) == ["0/2", "h:1"]
    assert words_of(["sweep", "x"]) is None and words_of(["sweep", "--distributed", "--help"]) is None


def test_the_parent_keeps_to_itself_what_jax_logs_of_a_process_that_was_lost(capfd):
    lines = [
        b"W1128 05:47 x.cc:1] slow compile\n", b"of two lines\n", b"[Gloo] Rank 0 is connected to 1 peer ranks.\n",
        b"F1128 05:47 client.h:80] Terminating because the JAX distributed service detected fatal errors\n",
        b"This suggests that the workers are out of sync.\n", b"    @ 0x7f\n", b"E1128 05:48 y.cc:1] another error\n",
    ]  # fmt: skip
    held = []
    _pass_on(io.BytesIO(b"".join(lines)), held)
    passed = lines[:2] + lines[-1:]
    assert capfd.readouterr().err == b"".join(passed).decode()
    assert "".join(held) == b"".join(line for line in lines if line not in passed).decode()


def test_the_parent_says_that_the_others_did_not_come():
    arguments = ["sweep", "x", "--out", "runs/x", "--distributed", "0/3", "h:1"]
    sentence = _describe_end(
        -6, FATAL + "Deadline Exceeded\nRPC: /xla.coordination.CoordinationService/RegisterTask", arguments
    )
    assert sentence.startswith(
        "process 0 of 3 did not meet the others within 300 seconds (start the same command in all"
    )


UNHEALTHY = "tasks are unhealthy (stopped sending heartbeats):\n1\n"
FATAL = "Terminating process because the JAX distributed service detected fatal errors. "


@pytest.mark.parametrize(
    "status, log, words",
    [
        (-6, UNHEALTHY + FATAL, "process 1 of 3 was lost (killed, preempted or cut off), which ended process 2"),
        (-6, FATAL + "Task 1 heartbeat timeout", "process 1 of 3 was lost"),
        (-6, FATAL + "Either the leader task was preempted", "process 0 of 3 was lost"),
        (-9, "", "process 2 of 3 was ended by SIGKILL, perhaps for lack of memory"),
        (-11, "", "process 2 of 3 was ended by SIGSEGV"),
    ],
)
def test_the_parent_says_which_process_was_lost_and_what_stays(status, log, words):
    arguments = ["train", "x", "--out", "runs/x", "--distributed", "2/3", "h:1"]
    sentence = _describe_end(status, log, arguments)
    assert sentence.startswith(words)
    assert sentence.endswith("; what runs/x holds stays, and the same command in every process resumes from it")
