#!/usr/bin/env bash
# A day on a rented node: a published SDAR model is evaluated, goes through SFT and DiPO, and is evaluated again.
# None of it has run on a GPU yet. What to rent, what to look at, several machines, Docker: docs/node.md.
#
#   bash runs.sh 1.7B     SDAR-1.7B-Chat on one GPU of 80 GB
#   bash runs.sh 8B       SDAR-8B-Chat on eight, of 140 GB (of 80 GB: DIPO=reduce_once=false)
#   bash runs.sh tiny     the same commands with a random model of 0.8 M parameters, on a CPU in about a minute
#
# First it prints a plan and checks the machine: exit code 2 and a line for each problem, before anything is
# downloaded. Interrupted at any moment, the same command goes on where it stopped, and skips what is finished.
#
#   DRY=1 (or --dry behind the size)   print the commands, and do nothing
#   OUT=runs/8B                        runs, checkpoints and the report go there
#   DATA=data/hub                      data sets and models go there (tiny: OUT/data)
#   SOURCE=/mnt/mirror                 a folder OWNER/REPO/... in place of the hub: data/download.py --source
#   GPUS=8                             of this machine
#   SFT= DIPO= EVAL=                   more fields of sft.py, dipo.py, evaluate.py: SFT="steps=50 lr=2e-5"
#   NNODES=2 NODE_RANK=0 MASTER=node0:29500     several machines, this one's number, any free port of number 0
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    echo "usage: bash runs.sh 1.7B | 8B | tiny [--dry]    (what they do: the top of runs.sh, docs/node.md)" >&2
    exit 2
}

# ------------------------------------------------------------------------------ what differs between the sizes

SIZE=${1:-} OUT=${OUT:-runs/${1:-}} DRY=${DRY:-}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER=${MASTER:-}
[ $# -lt 3 ] && [ "${2:---dry}" = --dry ] || usage
[ $# -lt 2 ] || DRY=1
case $SIZE in
    1.7B)  # one GPU, so a smaller RL set and three of the five benchmarks
        GPUS=${GPUS:-1} DATA=${DATA:-data/hub}
        BASE=$DATA/SDAR-1.7B-Chat
        DOWNLOAD=(SDAR-1.7B-Chat math500 gsm8k aime24 glm46_openr1_math_sft light_math_rl)
        SFT_RUN=(--config configs/sdar_1.7b_sft.yaml "data=$DATA/glm46_openr1_math_sft.jsonl" too_long=leave_out)
        DIPO_RUN=(--config configs/sdar_1.7b_dipo.yaml "data=$DATA/light_math_rl.jsonl" too_long=leave_out)
        TEST="data=[$DATA/math500.jsonl,$DATA/gsm8k.jsonl,$DATA/aime24.jsonl]"
        EVAL_RUN=(protocol=dirl)
        ;;
    8B)  # the recipe of the DiRL paper (arXiv 2512.22234) and its five benchmarks
        GPUS=${GPUS:-8} DATA=${DATA:-data/hub}
        BASE=$DATA/SDAR-8B-Chat
        DOWNLOAD=(SDAR-8B-Chat math500 gsm8k aime24 aime25 olympiadbench glm46_openr1_math_sft bigmath_rl)
        SFT_RUN=(--config configs/sdar_8b_sft.yaml "data=$DATA/glm46_openr1_math_sft.jsonl" too_long=leave_out)
        DIPO_RUN=(--config configs/sdar_8b_dipo.yaml "data=$DATA/bigmath_rl.jsonl" too_long=leave_out)
        TEST="data=[$DATA/math500.jsonl,$DATA/gsm8k.jsonl,$DATA/aime24.jsonl,$DATA/aime25.jsonl"
        TEST+=",$DATA/olympiadbench.jsonl]"
        EVAL_RUN=(protocol=dirl)
        ;;
    tiny)  # a few steps: this shows that all of it runs, and nothing else
        GPUS=${GPUS:-1} DATA=${DATA:-$OUT/data}
        BASE=$OUT/base
        SFT_RUN=(--config configs/demo_sft.yaml "data=$DATA/sft.jsonl" steps=6 batch_size=16 save_every=2
            "eval_data=$DATA/validation.jsonl" eval_every=3 eval_limit=8 eval_max_tokens=16)
        # An untrained model is never right: it is rewarded for speed, at a threshold that it reaches.
        DIPO_RUN=(--config configs/demo_dipo.yaml "data=$DATA/rl.jsonl" steps=4 groups=2 max_tokens=16 save_every=1
            "eval_data=$DATA/validation.jsonl" eval_limit=8 eval_max_tokens=16 rewards.speed=1.0 threshold=0.01)
        TEST="data=[$DATA/test.jsonl]"
        EVAL_RUN=(protocol=dirl dtype=float32 samples=2 max_tokens=32 min_tokens=4)
        ;;
    *) usage ;;
esac
read -ra MORE <<<"${SFT:-}" && SFT_RUN+=("${MORE[@]}")
read -ra MORE <<<"${DIPO:-}" && DIPO_RUN+=("${MORE[@]}")
read -ra MORE <<<"${EVAL:-}" && EVAL_RUN+=("${MORE[@]}")

# ---------------------------------------------------------------------------------- how a command is started

# run COMMAND: print it as it could be typed, then run it.
run() {
    local word line='$'
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./=:,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "$line"
    [ "$DRY" ] && return
    local code=0
    "$@" || code=$?
    [ $code -eq 0 ] || stopped $code
}

stopped() {
    echo "stopped (exit code $1): the same command goes on from here" >&2
    exit "$1"
}

# stage NAME SCRIPT FIELDS: run it in OUT/NAME, on all GPUs of all machines, unless the plan found it finished.
# torch.distributed.run is torchrun, of this Python.
PORT=${MASTER##*:} PLAN=
stage() {
    local name=$1 start=(python)
    if [ "$NNODES" -gt 1 ]; then
        # A port for each stage: a machine that is ahead does not meet what the last stage left at the old one.
        start+=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$GPUS"
            --rdzv_backend c10d --rdzv_endpoint "${MASTER%:*}:$((PORT++))" --rdzv_id "$name"
            --rdzv_conf "read_timeout=600,join_timeout=600")
    elif [ "$GPUS" -gt 1 ]; then
        start+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
    fi
    shift
    grep "^skipped: $name " <<<"$PLAN" || run "${start[@]}" "$@" "out=$OUT/$name"
}

# ------------------------------------------------------------------------------------ the plan, and the machine

if [ ! "$DRY" ]; then
    # Is this the environment with the packages? benchmarks/node.py imports them, and then looks at their versions.
    NEEDED="torch transformers numpy omegaconf math_verify safetensors huggingface_hub tqdm matplotlib"
    MISSING=$(python -c "from importlib.util import find_spec
print(*(name for name in '$NEEDED'.split() if not find_spec(name)))" 2>&1) || MISSING=python
    if [ "$MISSING" ]; then
        echo "error: missing here: $MISSING (activate the environment that has it: docs/node.md)" >&2
        exit 2
    fi
    PLAN=$(DRY=1 bash runs.sh "$SIZE" | python benchmarks/node.py --size "$SIZE" --gpus "$GPUS" --nodes "$NNODES" \
        --master "$MASTER" --out "$OUT" --data "$DATA") || { code=$? && echo "$PLAN" && exit $code; }
    grep -v "^skipped: " <<<"$PLAN"
fi

# ------------------------------------------------------------------------------------------------ 1. download

# Everything with its checksum, to DATA; what is there already is checked only. Machine 0 fetches for all of them:
# OUT and DATA are on a disk that all see.
if [ "$NODE_RANK" -ne 0 ]; then
    until [ "$DRY" ] || [ -e "$OUT/downloaded" ]; do sleep 5; done
elif [ "$SIZE" != tiny ]; then
    run python data/download.py --out "$DATA" ${SOURCE:+--source "$SOURCE"} "${DOWNLOAD[@]}"
elif [ "$DRY" ] || [ ! -e "$OUT/downloaded" ]; then
    run python data/tiny.py --out "$DATA" --sft 64 --rl 64 --validation 8 --test 8
    run python -c "import model; from plumbing.checkpoint import tiny; tiny('$BASE')"
else
    echo "skipped: data and model (they are in $OUT)"
fi
[ "$DRY" ] || { mkdir -p "$OUT" && touch "$OUT/downloaded"; }

# ------------------------------------------------------------------------- 2. the published model, evaluated

# First, since it shows that the rollout engine works here: SDAR-8B-Chat, dynamic, is published as 71.9 on MATH500.
stage eval_base evaluate.py "${EVAL_RUN[@]}" "$TEST" "model=$BASE"

# --------------------------------------------------------------------------------------- 3. SFT, and how good

stage sft sft.py "${SFT_RUN[@]}" "model=$BASE" resume=true
stage eval_sft evaluate.py "${EVAL_RUN[@]}" "$TEST" "model=$OUT/sft/latest"

# -------------------------------------------------------------------------------------- 4. DiPO, and how good

stage dipo dipo.py "${DIPO_RUN[@]}" "model=$OUT/sft/latest" resume=true
stage eval_dipo evaluate.py "${EVAL_RUN[@]}" "$TEST" "model=$OUT/dipo/latest"

# -------------------------------------------------------------------------------------------------- 5. report

# Is each stage better than the one before it? Paired bootstrap over the questions.
if [ "$NODE_RANK" -eq 0 ]; then
    run python benchmarks/compare.py "$OUT/eval_base" "$OUT/eval_sft"
    run python benchmarks/compare.py "$OUT/eval_sft" "$OUT/eval_dipo"
    # Every stage has written a report.html of its own; this one has the questions that the training changed.
    run python plumbing/report.py "$OUT/eval_base" "$OUT/eval_dipo" --out "$OUT/report.html"
    [ "$DRY" ] || echo "finished: $OUT/report.html has the figures, $OUT/dipo/latest the model"
fi
