"""The estimate of a training step's memory: against every committed peak, on loaded models, and what is said of it."""
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, Qwen2Config

import common
from bench.workload import SHAPES

REPO = Path(__file__).parent.parent
GIB = 2**30
QWEN = Qwen2Config(**SHAPES["qwen2.5-0.5b"])


def sizes(config) -> tuple[float, float, int]:
    """Bytes of the weights in bfloat16 and in NF4 with its scales, and parameters of LoRA, r = 16."""
    hidden, between, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    products = layers * hidden * (2 * hidden + 2 * keys + 3 * between)
    embedding = config.vocab_size * hidden
    lora = 16 * layers * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + between))
    return 2 * (products + embedding), 2 * embedding + 0.516 * products, lora


BF16, NF4, LORA = sizes(QWEN)
PPO = {"weights": 2 * BF16, "trained": 2 * LORA, "tokens": 4096}  # policy and critic
# PPO's peaks there and of results/runs are of code whose first pass with a second model had memory of its own.
OLD_PPO = "nvidia-h100-80gb-hbm3"


def benchmark():
    """(name, measured GiB, what training_memory is told) of our cases in results/bench, at the scripts' defaults."""
    for file in (REPO / "results" / "bench").glob("*.json"):
        for case in json.loads(file.read_text())["cases"]:
            name, told = case["workload"], {"weights": BF16, "trained": LORA, "tokens": 8192}
            if case["system"] != "rungs" or name == "sample" or case["settings"]["flags"] or \
                    name == "ppo-step" and file.stem == OLD_PPO:
                continue
            told |= {"sft-nf4": {"weights": NF4}, "reward": {"head": False}, "grpo-step": {"rows": 64, "length": 640},
                     "ppo-step": {"rows": 64, "length": 640, **PPO}}.get(name, {})
            yield name, case["peak_gib"], told


def runs():
    """The same of the runs in results/runs that were trained on one GPU, for bases of this shape."""
    for file in (REPO / "results" / "runs").glob("*.json"):
        run = json.loads(file.read_text())
        args, method, curves = run["args"], run["method"], run["curves"]
        if "qwen2.5-coder-0.5b" not in args["model"].lower() or run["hardware"]["gpus"] != 1 or method == "ppo":
            continue  # see OLD_PPO
        told = {"weights": NF4 if args.get("quantization") == "qlora" else BF16, "trained": LORA,
                "tokens": args["micro_tokens"]}
        if method == "grpo":
            at_once = max(args["batch_size"] * args["group_size"],
                          run["metrics"]["heldout_problems"] * max(1, 2 * args["pass_k"]))
            longest = 256  # of GSM8K's prompts, as --preview says
            told |= {"rows": min(common.MAX_BATCH, at_once), "length": longest + args["completion_tokens"]}
        elif method != "kto":  # a record's curve is of means over some steps; KTO's largest step fills a micro-batch
            told["tokens"] = min(told["tokens"], max(curves["tokens"]))
        yield f"{run['name']}-{run['seed']}", max(peak for peak in curves["peak_gib"] if peak), told


def cards():
    """The same of bench/cards.py's runs whose micro-batches are full: at the default of 8,192 few steps fill one."""
    for run in json.loads((REPO / "results" / "bench" / "cards" / "nvidia-h200.json").read_text())["runs"]:
        config = Qwen2Config(**SHAPES[run["shape"]])
        bf16, nf4, lora = sizes(config)
        told = {"config": config, "weights": bf16, "trained": lora, "tokens": run["micro_tokens"]}
        told |= {"sft": {"weights": nf4}, "reward": {"weights": nf4, "head": False}, "grpo": {"rows": 64, "length": 640},
                 "ppo": {"weights": bf16 + nf4, "trained": 2 * lora, "rows": 64, "length": 640}}.get(run["script"], {})
        if run["fits"] and run["micro_tokens"] < 8192:
            yield f"{run['script']}, {run['shape']}, {run['limit_gib']:g} GiB", run["peak_gib"], told


# bench/NOTES.md: memory, more GPUs, and the plain engine
NOTED = [("sft, 2048", 4.5, {"weights": BF16, "trained": LORA, "tokens": 2048}),
         ("ppo, 8192", 14.5, PPO | {"tokens": 8192, "rows": 64, "length": 640}),
         ("grpo, 256 answers", 14.68, {"weights": BF16, "trained": LORA, "tokens": 8192, "rows": 256, "length": 640}),
         ("plain sft", 21, {"weights": BF16, "trained": LORA, "tokens": 8192, "fast": False}),
         ("plain dpo", 19, {"weights": BF16, "trained": LORA, "tokens": 8192, "fast": False})]


@pytest.mark.parametrize("name, measured, told", [*benchmark(), *runs(), *cards(), *NOTED])
def test_measured_peaks_are_within_a_fifth(name, measured, told):
    expected = sum(common.training_memory(**{"config": QWEN} | told).values()) / GIB
    assert 0.8 * measured <= expected <= 1.2 * measured


def test_a_small_micro_batch_has_fewer_logits():
    """At 1,024 tokens a chunk of 1,024 predicted ones would be all of them."""
    assert [common.head_chunk(n) for n in (16384, 8192, 4096, 2048, 1024, 100)] == [1024, 1024, 1024, 512, 256, 256]
    head = {n: common.training_memory(QWEN, NF4, LORA, n)["head"] for n in (4096, 1024)}
    assert head[4096] == 4 * head[1024] == 1024 * 151936 * 4 * 2


def test_enough_figures_are_committed():
    assert len([*benchmark()]) >= 6 and len([*runs()]) >= 3


def test_of_models_as_they_are_loaded(tiny_model, monkeypatch):
    """Weights and trained parameters are the tensors' own bytes; a step of fewer tokens, more ranks, a reward model."""
    policy = common.add_lora(common.load_model(tiny_model, dtype=torch.float32))
    expected = common.expected_memory([policy], 8192, 1000, rows=10, length=100)
    base, learned = common.base_of(policy), common.trainable(policy)
    assert expected["weights"] == 4 * (sum(p.numel() for p in base.parameters()) - sum(p.numel() for p in learned))
    assert expected["adapter"] == 24 * sum(p.numel() for p in learned)
    assert expected["sampler"] > 10 * 100 * 2 * 2 * 2 * 16 * 4 and expected["head"] > 0
    assert expected["activations"] == common.expected_memory([policy], 1000, 9999)["activations"]
    two = common.expected_memory([policy, policy], 1000, 9999)
    assert two["activations"] == expected["activations"] and two["weights"] == 2 * expected["weights"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.expected_memory([policy], 8192, 1000)["activations"] == expected["activations"] / 2
    assert common.expected_memory([common.add_head(policy, 0)], 8192, 1000)["head"] == 0


def test_what_is_said():
    """A step that fits; one that fits with the --micro-tokens that it names; one that never does; no estimate."""
    def expected(tokens):
        return common.training_memory(QWEN, BF16, LORA, tokens, rows=64, length=1024)
    need = sum(expected(8192).values())
    assert common.memory_note(expected, 1.1 * need, 8192).startswith("memory: about 11.")
    note = common.memory_note(expected, 0.7 * need, 8192)
    fitting = int(note.partition("--micro-tokens ")[2].partition(",")[0])
    assert note.startswith("WARNING: memory:") and 2048 < fitting < 6144
    assert common.memory_note(expected, 0.7 * need, fitting).startswith("memory:")
    assert common.memory_note(expected, 0.7 * need, fitting + 256).startswith("WARNING")
    assert "choose a smaller model" in common.memory_note(expected, GIB, 8192)
    for free in (1.8, 2.6, 4, 6):  # the most that fits: few tokens have fewer logits at a time
        needed = {n: common.training_memory(QWEN, NF4, LORA, n) for n in range(256, 8193, 256)}
        note = common.memory_note(needed.get, free * GIB, 8192)
        fitting = int(note.partition("--micro-tokens ")[2].partition(",")[0])
        assert sum(needed[fitting].values()) <= 0.95 * free * GIB < sum(needed[fitting + 256].values())
    assert common.training_memory(GPT2Config(), 1, 1, 1) == {}
    assert "no estimate" in common.memory_note(lambda tokens: {}, GIB, 8192)


def test_a_larger_model_needs_more(tiny_model):
    """Of each part, for any configuration that is served."""
    small = common.training_memory(AutoConfig.from_pretrained(tiny_model), 1, 1, 64, rows=1, length=8)
    large = common.training_memory(QWEN, 2, 2, 64, rows=1, length=8)
    assert small.keys() == large.keys() and all(0 < small[k] < large[k] for k in small)


def test_free_memory_is_within_the_limit(monkeypatch):
    """Of a card of 140 GiB with 100 free: all of these, or what RUNGS_GPU_GIB=4 leaves beside 1 that is reserved."""
    device, limit = torch.device("cuda"), {"get_per_process_memory_fraction": 1.0, "memory_reserved": 2**30}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100 * 2**30, 140 * 2**30))
    for name in limit:
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, name=name: limit[name])
    assert common.free_memory(device) == 100 * 2**30
    limit["get_per_process_memory_fraction"] = 4 / 140
    assert common.free_memory(device) == pytest.approx(3 * 2**30)


def test_measurements_give_up_recorded_passes(tiny_model):
    """In fp32 and where the weights stay as they are (NF4): what a policy is compared with runs without them."""
    for quantization, dtype in (("none", torch.bfloat16), ("nf4", torch.float32)):
        model = common.load_model(tiny_model, None, quantization, dtype, torch.device("cpu"), "fast")
        model.__dict__["recordings"] = object()
        assert common.upcast(model) == "float32"
        assert "recordings" not in model.__dict__ and model.dtype == torch.float32


def test_the_note_of_a_gpu(tiny_model, monkeypatch, capsys):
    """What note_memory prints where there is a GPU: of these models, for this step."""
    import memory
    policy = common.add_lora(common.load_model(tiny_model, None, "none", torch.float32, torch.device("cpu"), "fast"))
    monkeypatch.setattr(memory, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 2**20)
    need = sum(common.expected_memory([policy], 512, 4000).values())
    for free, said in ((2 * need, "memory: about"), (0.9 * need, "WARNING: memory: about")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free - 2**20)
        common.note_memory([policy], 512, 4000)
        assert capsys.readouterr().out.startswith(said)
