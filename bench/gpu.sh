#!/usr/bin/env bash
# What a card must show, in pieces of under ten minutes each; nothing is fetched. Give the pieces by name; all of them if none.
#
#   bench/gpu.sh [tests] [step] [step-1b] [step-8b] [sampler] [run] [compare] [style]
#
# PYTHON: the interpreter (python3); OUT: a folder for logs; QUERIES: for compare and style, a file with prompts. It stops after nine
# minutes with status 143 until it is done: ask for it again, and it goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' | tee "$OUT/card.txt"

piece() {
  case $1 in
    tests) "$PYTHON" -m pytest -p no:cacheprovider tests/training tests/engines/test_decoding.py tests/engines/test_embedded.py tests/test_pipeline.py ;;
    step) "$PYTHON" bench/trainer.py --queries 16 --steps 6 --repeats 3 && "$PYTHON" bench/trainer.py --queries 32 --micro 8 --steps 4 --cases bf16 ;;
    step-1b) "$PYTHON" bench/trainer.py --random 1b --queries 16 --micro 4 --steps 4 --cases bf16 "bf16 LoRA" ;;
    step-8b) "$PYTHON" bench/trainer.py --random 8b --queries 8 --micro 2 --steps 4 --cases "bf16 LoRA" ;;
    sampler) "$PYTHON" bench/sampler.py ;;
    run) "$PYTHON" -m selfsteer run quickstart "output=$OUT/quickstart" training.micro_batch_size=8 ;;
    compare) timeout --preserve-status --signal TERM "${SECONDS_EACH:-540}" "$PYTHON" -m selfsteer compare comparison-gpu \
      "queries.path=${QUERIES:?names no file}" "output=$OUT/comparison" --seeds 0,1,2 \
      --arms "${ARMS:-pbaa,sso,sso_greedy,equation_3,sft_only,cooler,slower,faster,gamma_1,dpop}" ;;
    style) timeout --preserve-status --signal TERM "${SECONDS_EACH:-540}" "$PYTHON" -m selfsteer compare comparison-style \
      "queries.path=${QUERIES:?names no file}" "output=$OUT/comparison-style" engine.batch_size=512 --seeds 0,1,2 \
      --arms "${ARMS:-pbaa,sso,pbaa_slow,sso_slow,pbaa_fast,sso_fast,equation_3,sft_only}" ;;
    *) echo "no piece $1" >&2; return 2 ;;
  esac
}

failed=0
for name in "${@:-tests step step-1b step-8b sampler run}"; do
  for each in $name; do
    echo "== $each"
    piece "$each" 2>&1 | tee "$OUT/$each.log" || failed=$?
  done
done
exit $failed
