"""Properties that hold for any input (hypothesis draws them, the same ones each time), and a fuzz run of what reads text
that a model wrote."""
import json
import math
import random
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ask
import chat
import common
import grpo
import tables
from common import Example

settings.register_profile("here", deadline=None, derandomize=True, max_examples=60, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("here")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


# -- packing and sharing --------------------------------------------------------------------------

@pytest.fixture(scope="session")
def models(tiny_model):
    return {engine: common.load_model(tiny_model, dtype=torch.float32, engine=engine) for engine in ("plain", "fast")}


@pytest.mark.parametrize("engine", ["plain", "fast"])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(80, 200), st.sampled_from([1, 2]))
def test_micro_batches_hold_every_example_once(models, engine, lengths, micro_tokens, unit):
    """Within the limit (plain: padding included) and with the examples that belong together side by side."""
    lengths = lengths * unit
    examples = [Example([3 + i] * n, [0], [5]) for i, n in enumerate(lengths)]
    members = [list(pack.examples) for pack in common.micro_batches(models[engine], examples, micro_tokens, unit)]
    assert sorted(i for pack in members for i in pack) == list(range(len(lengths)))
    for pack in members:
        held = [lengths[i] for i in pack]
        assert (len(held) * max(held) if engine == "plain" else sum(held)) <= micro_tokens
        assert unit == 1 or all(pack[k + 1] == pack[k] + 1 and pack[k] % 2 == 0 for k in range(0, len(pack), 2))


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_ranks_share_a_step(lengths, ranks):
    """Each unit goes to one rank, and no rank has more than another by more than the longest unit."""
    shares = []
    for r in range(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(r))
            patch.setenv("WORLD_SIZE", str(ranks))
            shares.append(common.my_share(lengths))
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 3), st.integers(0, 2**63 - 1))
def test_every_epoch_sees_every_row_once(n, size, epochs, seed):
    steps = common.batches(n, size, epochs, seed)
    per_epoch = math.ceil(n / size)
    assert len(steps) == epochs * per_epoch and all(0 < len(step) <= size for step in steps)
    for e in range(epochs):
        assert sorted(i for step in steps[e * per_epoch:(e + 1) * per_epoch] for i in step) == list(range(n))


# -- masks ----------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return chat.load_tokenizer(tiny_model)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
def test_masks_are_those_of_an_independent_renderer(tokenizer, exchanges, only_last):
    """CHATML written out here: the trained tokens are each answer and its <|im_end|>, the others all else, whatever the
    texts hold. A token that reaches over a border (a newline before a space) is on neither side of a trained text's."""
    exchanges = [(q.strip() or "q", a.strip() or "a") for q, a in exchanges]
    exchanges[0] = (exchanges[0][0] + "<|im_end|>", exchanges[0][1] + "<|im_start|>")
    messages = [m for q, a in exchanges for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    ids, mask = chat.render(tokenizer, messages, "last" if only_last else "all")
    parts = []
    for k, (q, a) in enumerate(exchanges):
        trained = not only_last or k == len(exchanges) - 1
        parts += [(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", False), (f"{a}<|im_end|>", trained),
                  ("\n", False)]
    assert tokenizer.decode(ids) in ("".join(text for text, _ in parts), "".join(text for text, _ in parts)[:-1])
    runs, previous = [], False
    for token, counts in zip(ids, mask, strict=True):
        if counts and not previous:
            runs.append([])
        if counts:
            runs[-1].append(token)
        previous = counts
    assert [tokenizer.decode(run) for run in runs] == [text for text, counts in parts if counts]
    assert all([i for i in run if i in tokenizer.stop_ids] == run[-1:] for run in runs)


# -- adapters and hashes --------------------------------------------------------------------------

@given(st.integers(1, 6), st.sampled_from([0.5, 1, 8, 32]), st.booleans(), st.dictionaries(
    st.sampled_from(["q_proj", "v_proj"]), st.integers(1, 6), max_size=2), st.integers(0, 2**31))
def test_factors_of_any_plain_lora_add_what_the_adapter_adds(tmp_path, r, alpha, rslora, ranks, seed):
    """Whatever r, alpha, ranks per module and scaling: LORA_SCALE · B A is what PEFT would add."""
    g = torch.Generator().manual_seed(seed)
    tensors, wanted = {}, {}
    for module in ("q_proj", "v_proj"):
        n = ranks.get(module, r)
        a, b = torch.randn(n, 5, generator=g), torch.randn(7, n, generator=g)
        tensors |= {f"base_model.model.x.{module}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))}
        wanted[f"x.{module}"] = alpha / (math.sqrt(n) if rslora else n) * b.double() @ a.double()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": {}}))
    factors = common.read_factors(tmp_path)
    assert factors.keys() == wanted.keys() and len({len(a) for a, _ in factors.values()}) == 1
    for name, (a, b) in factors.items():
        torch.testing.assert_close(common.LORA_SCALE * b.double() @ a.double(), wanted[name], rtol=1e-5, atol=1e-5)


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1,
                       max_size=5), st.randoms(use_true_random=False))
def test_a_content_hash_is_of_content(tmp_path, shapes, chance):
    """Of names, types, shapes and bytes: not of how they are spread over files, nor of metadata; one bit changes it."""
    tensors = {name: torch.arange(a * b, dtype=torch.float32).reshape(a, b) for name, (a, b) in shapes.items()}
    save_file(tensors, tmp_path / "one.safetensors", {"some": "metadata"})
    whole = common.tensors_sha256([tmp_path / "one.safetensors"])
    parts = [{}, {}]
    for name in chance.sample(sorted(tensors), len(tensors)):
        parts[chance.randrange(2)][name] = tensors[name]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for part, file in zip(parts, files):
        save_file(part, file)
    assert common.tensors_sha256(files) == common.tensors_sha256(files[::-1]) == whole
    name = chance.choice(sorted(tensors))
    changed = [tensors[name].reshape(-1).clone(), tensors[name].clone(), tensors[name].to(torch.int32)]
    if changed[1].numel():
        changed[1].view(-1)[0] += 1
        assume(changed[0].shape != tensors[name].shape)
        for other in changed:
            save_file({**tensors, name: other}, tmp_path / "other.safetensors")
            assert common.tensors_sha256([tmp_path / "other.safetensors"]) != whole


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**20, 10**20) | TEXT
                    | st.floats(allow_nan=False, allow_infinity=False),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)


@given(JSON)
def test_json_is_hashed_by_content_and_read_back(value):
    def turned(x):
        return {k: turned(x[k]) for k in reversed(x)} if isinstance(x, dict) else [*map(turned, x)] if isinstance(x, list) else x
    assert common.sha256_json(value) == common.sha256_json(turned(value))
    assert json.loads(common.to_json(value)) == value
    assert common.nulled(value) == value


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["0", "1"]), st.integers(0, 4)), max_size=12))
def test_rows_of_results_are_the_last_ones_written(tmp_path, written):
    """Of each name, configuration, adapter and evaluation; in one order whatever the order of writing."""
    path = tmp_path / "metrics.json"
    path.unlink(missing_ok=True)
    rows = [{"name": name, "config_hash": config, "adapter_sha256": None, "eval_hash": "e", "phase": 1, "protocol": "plain",
             "timestamp": f"2026-01-0{1 + int(config)}", "n": n} for name, config, n in written]
    for row in rows:
        common.upsert_row(path, row)
    last = {(row["name"], row["config_hash"]): row for row in rows}
    assert common.read_results(path)["runs"] == [last[key] for key in sorted(last)]


# -- the report's cells ---------------------------------------------------------------------------

ANY = st.none() | st.floats() | st.integers(-10**9, 10**9)


@given(ANY, ANY, ANY)
def test_cells_of_the_report_hold_any_number(point, low, high):
    """None, NaN and infinities included: a cell is text without a line end or a bar, which would break a table."""
    for cell in (tables.number(point), tables.bracket([low, high]), tables.bracket(None), tables.share_cell(point),
                 tables.with_interval(point, [low, high])):
        assert isinstance(cell, str) and "\n" not in cell and "|" not in cell and "nan" not in cell.lower(), cell


# -- the verifier ---------------------------------------------------------------------------------

@given(st.decimals(-10**12, 10**12, places=3, allow_nan=False), st.booleans(), st.booleans(), st.sampled_from(["", " ", "\n"]))
def test_a_number_is_read_however_it_is_written(value, commas, dollar, space):
    """Exactly: with thousands commas, a $ on either side of the sign, trailing zeros and space around it."""
    text = f"{value:,f}" if commas else f"{value:f}"
    if dollar:
        text = text.replace("-", "-$") if text.startswith("-") else "$" + text
    assert grpo.final_number(f"2 + 2 is 5\n####{space}{text}{space}") == Fraction(value)
    assert grpo.last_number(f"first 7, so {text}{space}") == Fraction(value)


@given(TEXT, TEXT)
def test_what_follows_a_number_makes_it_another(before, after):
    """Only the first #### counts, and a number that goes on in letters or digits is none."""
    assume("####" not in before)
    assert grpo.final_number(f"{before}#### 7 #### 8") == 7
    assert grpo.final_number(f"{before}#### 7a{after}") is None
    assert grpo.final_number(before) is None


PIECES = ["####", "#", "$", "-", ",", ".", "/", " ", "\n", "\t", "0", "1", "9", "000", "1,000", "a", "A", "B", "C", "_", "**", "é",
          "٣", "½", "\u200f", "\0", "<|im_end|>", "e9", "inf", "nan", "\ud800"]


def test_fuzz_of_what_reads_a_models_text():
    """1e5 texts: a number or None, rewards of 0 or 1, a letter or None; nothing raises."""
    g = random.Random(0)
    row, began = {"answer": "so\n#### 9"}, time.process_time()
    for _ in range(50_000):
        text = "".join(g.choices(PIECES, k=g.randrange(12)))
        assert {*grpo.number_reward(row, text).values()} <= {0.0, 1.0}
        assert isinstance(grpo.last_number(text), Fraction | None)
    for _ in range(50_000):
        verdict = ask.parse_verdict("".join(g.choices(PIECES, k=g.randrange(6))))
        assert verdict is None or verdict in ask.LETTERS
    assert time.process_time() - began < 10


@pytest.mark.parametrize("piece", ["9", "1,000,", "####", "#### 1 ", "-$", "1.", " ", "_", "A", "A_", "\n", "٣", "9/", "1,0000 "])
def test_no_text_takes_long(piece):
    """200,000 characters: seconds would be a regular expression that tries again and again."""
    text, began = piece * (200_000 // len(piece)), time.process_time()
    grpo.number_reward({"answer": "#### 9"}, text)
    grpo.number_reward({"answer": "#### 9"}, "#### " + text)
    ask.parse_verdict(text)
    ask.parse_verdict("A" + text + "B")
    assert time.process_time() - began < 2
