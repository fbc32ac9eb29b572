"""Kill every command at random moments, give the same command again, and compare with a run that was never stopped.

    python tests/torture.py --jobs 8 --kills 25                       # all scripts, into results/torture.json
    python tests/torture.py --only sft.py dpo.py --kills 2 --out ""   # two scripts, a few kills, nothing written

Each trial is a directory of its own in which a command on a tiny model runs as a user's would. It is stopped once or
twice, by SIGKILL, SIGTERM or SIGINT in turn, at a moment of one of three kinds:
    time    uniform over the time from the command's first look at its directory to its end
    write   before an access to its directory that changes something (open to write, rename, remove, …), any alike
    torn    the same, with half of what is written on disk: a temporary file cut in two, half a line of a log
Then the same command runs until it ends. What it left must be what the uninterrupted command left: the same files, the
same bytes, but for EXCEPTED and the line of minutes in a model card. A trial of `disk_full` runs in a file system that
is too small (tmpfs, as root), or under a limit on the size of a file; one of `rank_killed` runs on two ranks under
torchrun, of which one gets SIGKILL. metrics.json holds another row from the beginning, which must be there after every
stop.

results/torture.json, per script: "kills", how often it was stopped; "trials"; "identical", trials that ended alike;
"lost_rows", lines of logs and rows of results that are missing, in all trials; "leftovers", files that the
uninterrupted command doesn't leave, in TMPDIR too; "signals", how often each; "disk_full" and "rank_killed", the same
for these.
"""
import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).parent.parent
TRAINING = ("sft.py", "reward.py", "dpo.py", "kto.py", "grpo.py", "ppo.py")
SCRIPTS = (*TRAINING, "evaluate.py", "judge.py")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
EXCEPTED = {"seconds", "tokens_per_s", "wall_time_s", "timestamp", "hardware", "started", "rollout_s", "learn_s",
            "rollout_tokens_per_s", "learn_tokens_per_s"}  # times, throughput, host
PLOTS_OF_TIME = "curves.png"  # draws tokens_per_s
LIMIT = 300  # seconds that a command may take before it counts as hung

# In each process by PYTHONPATH: counts the accesses that change the trial's directory, and stops the process at one.
SITE = '''
import os, signal, sys, threading, time

plan = os.environ.get("TORTURE_PLAN")
if plan and os.environ.get("RANK", "0") == os.environ.get("TORTURE_RANK", "0") and not os.environ.get("TORTURE_OFF"):
    root, (kind, number, at, delay) = os.getcwd() + os.sep, plan.split(",")
    number, at, delay = int(number), int(at), float(delay)
    listing = open(os.environ["TORTURE_LIST"], "a") if kind == "list" else None
    state = {"count": 0, "busy": False}
    begun = time.time()

    def stop():
        os.kill(os.getpid(), number)
        if number == signal.SIGKILL:
            time.sleep(60)

    def tear(path, mode):
        """What a machine that lost its power leaves of a file that was being written."""
        if path.endswith(".tmp") and os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        elif path.endswith(".jsonl") and "a" in str(mode):
            with open(path, "a") as f:
                f.write('{"step": 1, "key": "ab')

    def changes(event, args):
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else False
            return str(path), bool(writes) or str(path).endswith(".tmp"), mode
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            return str(args[0]), True, None
        return "", False, None

    def hook(event, args):
        if state["busy"] or not event.startswith(("open", "os.", "shutil.")):
            return
        path, counts, mode = changes(event, args)
        path = os.path.abspath(path) if path else path
        if not counts or not path.startswith(root):
            return
        state["busy"] = True
        try:
            state["count"] += 1
            if listing:
                listing.write(f"{time.time() - begun}\\n")
                listing.flush()
            elif state["count"] == at:
                if kind == "time":
                    threading.Thread(target=lambda: (time.sleep(delay), stop()), daemon=True).start()
                else:
                    if kind == "torn":
                        tear(path, mode)
                    stop()
        finally:
            state["busy"] = False
    if kind != "line":
        sys.addaudithook(hook)
    else:  # this rank dies after `at` lines of the log and a while
        def watch():
            log = os.environ["TORTURE_LOG"]
            while not os.path.isfile(log) or open(log).read().count("\\n") < at:
                time.sleep(0.01)
            time.sleep(delay)
            stop()
        threading.Thread(target=watch, daemon=True).start()
'''

TASK = '''
def rows():
    return [{"prompt": f"{i} why is the sky blue", "i": i} for i in range(60)]


def reward(row, completion):
    return {"correct": float(len(completion) > row["i"] % 7), "format": 0.1 * (len(completion) < 15)}
'''


# -- the commands -----------------------------------------------------------------------------------

def make_inputs(work: Path) -> None:
    """A tiny random model, data, a task: what the commands read."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
    from conftest import make_model, write_data
    make_model(work / "model")
    (work / "data").mkdir()
    write_data(work / "data")
    (work / "task.py").write_text(TASK)
    (work / "site").mkdir()
    (work / "site" / "sitecustomize.py").write_text(SITE)


def commands(work: Path) -> dict[str, list[str]]:
    """{script: its arguments}, for a directory in which it makes <its name>/ and results/."""
    model, pairs = ["--model", f"{work}/model"], ["--data", f"{work}/data/preference.jsonl"]
    run = ["--dtype", "float32", "--device", "cpu", "--micro-tokens", "512", "--lr", "1e-3"]
    rows = ["--rows", "32", "--heldout-rows", "8", "--max-length", "128", "--batch-size", "4", "--checkpoint-every",
            "3"]
    eos = ["--eos-prompts", "4", "--eos-tokens", "8"]
    parent, scorer = ["--sft-adapter", f"{work}/sft.py/sft"], ["--reward-adapter", f"{work}/reward.py/reward"]
    plain, kept = ["--quantization", "none"], ["--results", "results"]
    rollouts = ["--updates", "5", "--completion-tokens", "12", "--prompt-tokens", "64", "--checkpoint-every", "2"]
    found = {
        "sft.py": [*model, *plain, "--data", f"{work}/data/sft.jsonl", *run, *rows, *eos],
        "reward.py": [*model, *plain, *pairs, *run, *rows, *kept],
        "dpo.py": [*parent, *pairs, *run, *rows, *eos],
        "kto.py": [*parent, *pairs, *run, *rows, *eos],
        "grpo.py": [*parent, "--task", f"{work}/task.py", *run, *rollouts, *kept, "--heldout-rows", "3",
                    "--batch-size", "4",
                    "--group-size", "4", "--eval-every", "2", "--pass-k", "2"],
        "ppo.py": [*parent, *scorer, *pairs, *run, *rollouts, *kept, "--batch-size", "4", "--fixed-prompts", "4",
                   "--epochs",
                   "2", "--minibatches", "2", "--normalise", "8"],
        "evaluate.py": ["--adapter", f"{work}/sft.py/sft", "--eval-data", str(REPO / "data" / "demo" / "eval"),
                        "--limit", "2",
                        "--max-gen-toks", "8", "--dtype", "float32", "--device", "cpu", "--out", "results",
                        "--stamp", "stamp"],
        "judge.py": ["--rows", "base", f"{work}/dpo.py/dpo", "--against", f"{work}/sft.py/sft", "--pref-data",
                     f"{work}/data/preference.jsonl", "--prompts", "6", "--max-new-tokens", "12", "--dtype", "float32",
                     "--device", "cpu", "--judge-model", f"{work}/reward.py/reward", *kept]}
    return {script: [*(["--out", name_of(script)] if script in TRAINING else []), *flags] for script,
            flags in found.items()}


def name_of(script: str) -> str:
    """Of its run directory."""
    return script.removesuffix(".py")


NEEDS = {"dpo.py": ["sft.py"], "kto.py": ["sft.py"], "grpo.py": ["sft.py"], "ppo.py": ["sft.py", "reward.py"],
         "evaluate.py": ["sft.py"], "judge.py": ["sft.py", "dpo.py", "reward.py"]}


def execute(work: Path, script: str, place: Path, plan: str = "", ranks: int = 1, size: int = 0,
            **environment) -> tuple:
    """(exit code, what it printed) of the script's command in the directory `place`. size: no file may be larger."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": "", "TORTURE_PLAN": plan,
                   "PYTHONPATH": os.pathsep.join(filter(None, (str(work / "site"), os.environ.get("PYTHONPATH")))),
                   "HF_HOME": str(work / "cache"), "TQDM_DISABLE": "1", "TMPDIR": str(temporary(place)), **environment}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    process = subprocess.Popen([sys.executable, *launcher, str(REPO / script), *commands(work)[script]], cwd=place,
                               env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True,
                               preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size,
                                                                                              size))) if size else None)
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, printed


def temporary(place: Path) -> Path:
    """The directory of a trial's temporary files, beside its own."""
    found = place.with_name(f"{place.name}.tmp")
    found.mkdir(parents=True, exist_ok=True)
    return found


OTHER_ROW = {"name": "other", "phase": 0, "protocol": "plain", "timestamp": "2026-01-01", "config_hash": "0",
             "adapter_sha256": None, "eval_hash": "0"}


def prepare(place: Path) -> Path:
    """A trial's directory: empty, but for a row of results that is there already."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "results").mkdir(exist_ok=True)
    (place / "results" / "metrics.json").write_text(json.dumps({"schema_version": 1, "runs": [OTHER_ROW]}))
    return place


def reference(work: Path, script: str, ranks: int = 1) -> Path:
    """Run a command to its end; the times of its accesses go to <place>.times."""
    place = prepare(work / (script if ranks == 1 else f"{script}.ranks"))
    code, printed = execute(work, script, place, "list,0,0,0", ranks, TORTURE_LIST=f"{place}.times")
    if code:
        raise SystemExit(f"{script} fails without being stopped:\n{printed}")
    with open(f"{place}.times", "a") as f:
        f.write(f"{time.time()}\n")
    return place


# -- what is compared -------------------------------------------------------------------------------

def without(obj):
    """A JSON value without the excepted fields."""
    if isinstance(obj, dict):
        return {k: without(v) for k, v in obj.items() if k not in EXCEPTED}
    return [without(v) for v in obj] if isinstance(obj, list) else obj


def content(path: Path):
    """What must be equal of a file."""
    if path.suffix == ".json":
        return without(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "README.md":
        return [line for line in path.read_text().splitlines() if not line.startswith("| minutes |")]
    if path.name == "index.html":
        data = path.read_text().partition('id="data">')[2].partition("</script>")[0]
        return without(json.loads(data))
    return None if path.name == PLOTS_OF_TIME else path.read_bytes()


def tree(place: Path) -> dict[str, Path]:
    """The files of a trial, but for locks, which stay by design."""
    return {str(p.relative_to(place)): p for p in place.rglob("*") if p.is_file() and not p.name.endswith((".lock",
                                                                                                           ".holder"))}


def rows_of(path: Path) -> int:
    """Lines of a log, or rows of a results file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as f:
            return sum(1 for _ in f)
    found = json.loads(path.read_text()) if path.suffix == ".json" else {}
    return len(found.get("runs", found.get("rows", []))) if isinstance(found, dict) else 0


def compare(place: Path, whole: Path) -> dict:
    """{"identical", "lost_rows", "leftovers", "differs": names} of a trial against the uninterrupted command's."""
    mine, theirs = tree(place), tree(whole)
    differs = [name for name in theirs if name not in mine or content(mine[name]) != content(theirs[name])]
    lost = sum(max(0, rows_of(path) - (rows_of(mine[name]) if name in mine else 0)) for name, path in theirs.items())
    extra = sorted(set(mine) - set(theirs)) + [str(p) for p in temporary(place).glob("rungs-*")]
    return {"identical": not differs and not extra, "lost_rows": lost, "leftovers": len(extra),
            "differs": differs + extra}


# -- trials -----------------------------------------------------------------------------------------

def moment(times: list[float], kind: str, generator: random.Random) -> tuple[int, float]:
    """(number of an access, seconds after it) of a stop."""
    if kind != "time":
        return generator.randint(1, len(times)), 0.0
    at = generator.uniform(times[0], times[-1] + 0.3)
    before = max(i for i, t in enumerate(times) if t <= at)
    return before + 1, at - times[before]


def kept_row(place: Path) -> bool:
    """Is the row that was there before still there, in a file that can be read?"""
    return OTHER_ROW in json.loads((place / "results" / "metrics.json").read_text())["runs"]


def trial(work: Path, script: str, number: int, kind: str, seed: int) -> dict:
    """One trial; `kind` is "kill", "disk_full" or "rank_killed"."""
    generator = random.Random(f"{seed} {script} {number} {kind}")
    ranks = 2 if kind == "rank_killed" else 1
    whole = work / (f"{script}.ranks" if ranks > 1 else script)
    place = work / "trials" / f"{script}-{kind}-{number}"
    for old in (place, temporary(place)):
        shutil.rmtree(old, ignore_errors=True)
    prepare(place)
    times = [float(line) for line in Path(f"{whole}.times").read_text().split()[:-1]]
    stops, lost, printed, mounted = [], 0, [], False
    if kind == "disk_full":
        sizes = [-(-p.stat().st_size // 4096) * 4096 for p in tree(whole).values()]
        if mounted := mount(place, max(8192, round(generator.uniform(0.05, 0.9) * sum(sizes)))):
            prepare(place)
            code, out = execute(work, script, place)
        else:
            code, out = execute(work, script, place, size=generator.randrange(64, max(sizes)))
        stops.append("disk_full" if code else "not stopped")
        printed.append(out)
        lost += not kept_row(place)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    elif kind == "rank_killed":
        log = f"{name_of(script)}/log.jsonl"
        lines = (whole / log).read_text().count("\n")
        plan = f"line,{signal.SIGKILL},{generator.randint(1, lines)},{generator.uniform(0, 0.2)}"
        code, out = execute(work, script, place, plan, ranks, TORTURE_RANK=str(number % 2), TORTURE_LOG=log)
        stops.append("SIGKILL" if code else "not stopped")
        printed.append(out)
    else:
        for again in range(1 + (generator.random() < 0.3)):
            name = SIGNALS[(number + again) % 3]
            for way in (("time", "write", "torn")[generator.choice((0, 0, 1, 1, 2))], "write"):
                if way == "torn":
                    name = "SIGKILL"
                at, delay = moment(times, way, generator)
                code, out = execute(work, script, place, f"{way},{getattr(signal, name):d},{at},{delay}")
                printed.append(f"[{way} {name} at access {at} + {delay:.2f} s: code {code}]\n{out}")
                lost += not kept_row(place)
                if code or again:
                    break
                shutil.rmtree(place)  # it ended before its moment came: from the beginning, with one that comes
                prepare(place)
            stops.append(name if code else "not stopped")
    code, out = execute(work, script, place, ranks=ranks)
    printed.append(f"[again: code {code}]\n{out}")
    result = compare(place, whole)
    result["lost_rows"] += lost
    result["identical"] &= code == 0
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
    if result["identical"]:
        shutil.rmtree(place)
        shutil.rmtree(temporary(place))
    return {"script": script, "kind": kind, "stops": stops, "code": code, **result, "place": str(place),
            "printed": "\n".join(printed)}


def mount(place: Path, size: int) -> bool:
    """Mount a tmpfs of `size` bytes there; False where that isn't allowed."""
    if os.geteuid() or not sys.platform.startswith("linux"):
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
                          capture_output=True).returncode == 0


def summary(trials: list[dict]) -> dict:
    return {"kills": sum(s != "not stopped" for t in trials for s in t["stops"]), "trials": len(trials),
            "identical": sum(t["identical"] for t in trials), "lost_rows": sum(t["lost_rows"] for t in trials),
            "leftovers": sum(t["leftovers"] for t in trials)}


def figures(trials: list[dict]) -> dict:
    """What goes into the results file."""
    found = {}
    for script in dict.fromkeys(t["script"] for t in trials):
        by_kind = {kind: [t for t in trials if t["script"] == script and t["kind"] == kind]
                   for kind in ("kill", "disk_full", "rank_killed")}
        signals = Counter(s for t in by_kind["kill"] for s in t["stops"])
        found[script] = {**summary(by_kind["kill"]), "signals": dict(sorted(signals.items())),
                         **{kind: summary(by_kind[kind]) for kind in ("disk_full", "rank_killed") if by_kind[kind]}}
    return found


def added(one, other):
    """Figures of two results files as one: numbers are summed, key by key."""
    if not isinstance(one, dict):
        return one + other
    return {k: added(one[k], other[k]) if k in one and k in other else one.get(k, other.get(k)) for k in one | other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time, one thread each")
    parser.add_argument("--kills", type=int, default=25, help="trials with kills, per script")
    parser.add_argument("--disks", type=int, default=2, help="trials with a full disk, per script")
    parser.add_argument("--ranks", type=int, default=2, help="trials under torchrun, a rank killed, per training script")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="begin no trial after this time; 0: no limit")
    parser.add_argument("--out", default=str(REPO / "results" / "torture.json"), help='results file; "" for none')
    parser.add_argument("--add", action="store_true", help="add to the figures that the results file has (another --seed)")
    parser.add_argument("--work", help="directory to work in; by default a temporary one")
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="rungs-torture-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(args.work or scratch).resolve()
        make_inputs(work)
        wanted = [s for s in SCRIPTS if s in args.only or any(s in NEEDS.get(o, ()) for o in args.only)]
        ready, trials, pending = {}, [], []

        def whole(script: str, ranks: int = 1) -> Path:
            for parent in NEEDS.get(script, ()):
                ready[parent].result()
            return reference(work, script, ranks)
        for script in wanted:  # parents come first in SCRIPTS, so that none waits for one that hasn't begun
            ready[script] = pool.submit(whole, script)
        in_pairs = {s: pool.submit(whole, s, 2) for s in args.only if s in TRAINING and args.ranks}

        def one(script, number, kind):
            (in_pairs if kind == "rank_killed" else ready)[script].result()
            if args.seconds and time.time() - began > args.seconds:
                return None
            return trial(work, script, number, kind, args.seed)
        todo = [(number, script, kind) for script in args.only
                for kind, n in (("kill", args.kills), ("disk_full", args.disks),
                                ("rank_killed", args.ranks if script in TRAINING else 0)) for number in range(n)]
        for number, script, kind in sorted(todo, key=lambda t: (t[0], t[2])):  # each script gets its share in time
            pending.append(pool.submit(one, script, number, kind))
        for future in pending:
            if (t := future.result()) is not None:
                trials.append(t)
                if not t["identical"] or t["lost_rows"]:
                    print(f"{t['script']} {t['kind']} {t['stops']}: code {t['code']}, {t['differs']}, "
                          f"{t['lost_rows']} rows lost; {t['place']}\n{t['printed']}\n", flush=True)
        trials.sort(key=lambda t: SCRIPTS.index(t["script"]))
        found = figures(trials)
    for script, row in found.items():
        print(f"{script:12} " + json.dumps(row))
    if args.out:
        import common
        common.write_json(args.out, added(json.loads(Path(args.out).read_text()), found) if args.add else found)
    print(f"{len(trials)} trials of {len(todo)} in {time.time() - began:.0f} s")
    if len(trials) < len(todo) or any(not t["identical"] or t["lost_rows"] for t in trials):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
