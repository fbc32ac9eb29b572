"""--track: what W&B, offline and without a key, has on disk when a run is over; trackers that are absent or fail."""
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import common
import grpo
import ppo
import sft
import tracking

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2  # noqa: E402


def read_wandb(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; a fragment is
    checksum, length, type: whole, first, middle or last)."""
    content, at, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items):
    """{key: value} of a record's items."""
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No account, no key; a function that reads back what W&B wrote: [(run record, history lines, files)] by start."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))

    def read():
        wandb.teardown()  # waits for the service: run.finish() returns before it has written the file
        found = []
        for file in sorted(home.glob("wandb/offline-run-*/*.wandb")):
            records = [*read_wandb(file)]
            run = next(r.run for r in records if r.HasField("run"))
            lines = [values(r.history.item) for r in records if r.HasField("history")]
            found.append((run, lines, sorted(p.name for p in (file.parent / "files").rglob("*") if p.is_file())))
        return found
    wandb.teardown()  # what an earlier test made it read from the environment
    yield read
    wandb.teardown()


def log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def same_steps(tracked, logged):
    """Every line of log.jsonl is in the history, value by value."""
    steps = {line["step"]: line for line in tracked if "seconds" in line}
    assert sorted(steps) == [line["step"] for line in logged]
    for line in logged:
        assert {"kl", "rewards", "completion_tokens"} <= steps[line["step"]].keys()
        for key, value in line.items():
            assert steps[line["step"]].get(key) == (pytest.approx(value) if value is not None else None), key


def test_a_stopped_grpo_run_goes_on_as_the_same_run(grpo_args, tmp_path, offline, monkeypatch, capsys):
    """KL, reward and length of every update, β = 0 included; then figures, hashes, curves and sample answers."""
    out, write_log = tmp_path / "run", common.Run.log

    def log_and_signal(self, update, *line):
        write_log(self, update, *line)
        if update == 0:
            os.kill(os.getpid(), signal.SIGTERM)
    args = grpo.Args(**{**grpo_args, "beta": 0.0, "results": str(tmp_path)}, out=str(out), track="wandb")
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common.Run, "log", log_and_signal)
        grpo.main(args)
    grpo.main(args)
    (first, before, _), (second, after, files) = offline()
    assert first.run_id == second.run_id == common.read_json(out / "run.json")["track_id"]
    config = values(first.config.update)
    record = common.read_json(out / "run.json")
    assert first.project == "rungs" and first.display_name == "run"
    assert {k: config[k] for k in ("config_hash", "train_invariants", "family", "weights_sha256")} == {
        k: record[k] for k in ("config_hash", "train_invariants", "family", "weights_sha256")}
    assert config["args"]["group_size"] == 4
    same_steps([*before, *after], log(out))
    final = after[-1]
    assert final["final/adapter_sha256"] == record["adapter_sha256"]
    for key in ("kl_reference", "pass_1_before", "pass_1_after"):
        assert final[f"final/{key}"] == pytest.approx(record["metrics"][key])
    samples = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert final["completions/nrows"] == len(samples) and any(f.startswith("curves") for f in files)
    assert final["curves/_type"] == "image-file" and any(f.endswith(".table.json") for f in files)
    columns, rows = tracking.sample_table(out / "completions.jsonl")
    assert [row[columns.index("after/text")] for row in rows] == [sample["after"]["text"] for sample in samples]
    assert "wandb" not in record["config_hash"] and "failed" not in capsys.readouterr().out


def test_ppo_is_tracked_and_tracking_is_no_part_of_the_run(ppo_args, ppo_run, tmp_path, offline):
    """The same hash and bits as without; KL, reward and length of every update are those of log.jsonl."""
    args = ppo.Args(**{**ppo_args, "results": str(tmp_path)}, out=str(tmp_path / "ppo_v1"), track="wandb")
    ppo.main(args)
    ours, plain = (common.read_json(Path(run) / "run.json") for run in (args.out, ppo_run))
    assert ours["config_hash"] == plain["config_hash"] and ours["adapter_sha256"] == plain["adapter_sha256"]
    (run, lines, _), = offline()
    assert run.run_id == ours["track_id"] and run.run_id.startswith(ours["config_hash"])
    same_steps(lines, log(args.out))
    assert lines[-1]["completions/nrows"] == 4


class Refuses(BaseHTTPRequestHandler):
    """A W&B server that accepts no key."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("fault", ["absent", "refused", "lost"])
def test_a_tracker_that_fails_costs_one_warning(sft_args, sft_run, tmp_path, offline, monkeypatch, capsys, fault):
    """Not installed; a key that the server refuses, after which it logs offline; gone in the middle of the run."""
    key = "0123456789" * 4
    args = sft.Args(**sft_args, out=str(tmp_path / "sft_v2"), track="wandb")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if fault == "absent":
            monkeypatch.setitem(sys.modules, "wandb", None)
        if fault == "refused":
            monkeypatch.setenv("WANDB_API_KEY", key)
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        if fault == "lost":
            monkeypatch.setattr(tracking, "begin_wandb", lambda module, record, begin=tracking.begin_wandb:
                                finished(begin(module, record)))
        sft.main(args)
        server.shutdown()
    printed = "".join(capsys.readouterr())
    assert printed.count("WARNING: --track") == 1 and key not in printed
    ours, plain = (common.read_json(Path(run) / "run.json") for run in (args.out, sft_run))
    assert ours["adapter_sha256"] == plain["adapter_sha256"] and key not in json.dumps(ours)
    assert len(offline()) == (fault != "absent")
    if fault == "refused":
        assert "final/heldout_loss" in offline()[0][1][-1]


def finished(run):
    """A run that W&B takes nothing for any more."""
    run.finish()
    return run


def test_trackio_keeps_the_run(sft_args, tmp_path, monkeypatch, capsys):
    """Its local data base has every step's loss, the configuration and the final figures."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    trackio = pytest.importorskip("trackio")
    args = sft.Args(**sft_args, out=str(tmp_path / "sft_v2"), track="trackio")
    sft.main(args)
    record = common.read_json(tmp_path / "sft_v2" / "run.json")
    run, = trackio.Api().runs("rungs")
    assert run.name == f"sft_v2-{record['track_id']}" and run.config["config_hash"] == record["config_hash"]
    lines = [line for line in trackio.sqlite_storage.SQLiteStorage.get_logs("rungs", run.name)]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in log(args.out)]
    assert lines[-1]["final/heldout_loss"] == record["metrics"]["heldout_loss"] and "curves" in lines[-1]
    assert "WARNING: --track" not in capsys.readouterr().out


def test_the_id_is_of_configuration_and_place(tmp_path):
    a, b = tracking.new_id("01234567", tmp_path / "a"), tracking.new_id("01234567", tmp_path / "b")
    assert a != b and a.startswith("01234567-") and a != tracking.new_id("01234567", tmp_path / "a")
