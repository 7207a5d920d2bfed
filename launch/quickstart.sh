#!/usr/bin/env bash
# From nothing to a robot policy that acts, on a CPU, in about a quarter of an hour after installation.
#
#   bash launch/quickstart.sh [WORKDIR]        (default: ./quickstart; or gs://BUCKET/FOLDER)
#   bash launch/quickstart.sh --dry_run [WORKDIR]        print the commands, run nothing
#
# Run again, it skips finished stages; interrupted anywhere, it resumes. Other recipes for these stages:
#   bash launch/quickstart.sh --config=configs/road.py road        (driving; or CONFIG=configs/mine.py)
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=1
  shift
fi
if [[ "${1:-}" == --config=* ]]; then
  CONFIG="${1#--config=}"
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
CALLED_FROM="$PWD"
WORKDIR="${1:-quickstart}"
CONFIG="${CONFIG:-configs/quickstart.py}"
cd "$REPOSITORY"
extras=base driving=""
if grep -q "simulators.road" "$CONFIG"; then extras=driving driving=1; fi
if [[ "$WORKDIR" == gs://* ]]; then
  extras="$([[ "$extras" == base ]] && echo gcs || echo "$extras,gcs")"
else
  WORKDIR="$(cd "$CALLED_FROM" && realpath -m "$WORKDIR")"
fi
if [[ -z "$dry_run" ]]; then
  install_project "$extras"
  [[ "$WORKDIR" == gs://* ]] || mkdir -p "$WORKDIR"
fi
# Two-megabyte pages for large buffers: training on CPU is a third faster with them.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
[[ -t 2 ]] || export TQDM_MININTERVAL=15  # a log file needs no living progress bar

# stage NAME OUTPUT MODULE ARGUMENTS...: one command of the package, with the config of that name.
stage() {
  local name="$1" output="$2" module="$3"
  shift 3
  run "$PROJECT_PYTHON" launch/stage.py --record="$WORKDIR/stages.jsonl" --name="$name" \
    --output="$WORKDIR/$output" -- "$PROJECT_PYTHON" -m "univla_jax.$module" "$@"
}

# run COMMAND...: runs it, or prints it where nothing shall be run.
run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

demonstrations="$WORKDIR/demonstrations"
tokenizers="$WORKDIR/tokenizers"

stage demonstrations demonstrations demonstrate --config="$CONFIG:demonstrations" \
  --out="$demonstrations"
for kind in text action vision; do
  stage "tokenizer_$kind" "tokenizers/$kind" fit_tokenizer --config="$CONFIG:$kind" \
    --source="$demonstrations" --workdir="$tokenizers/$kind"
done
stage tokens tokens tokenize_dataset --config="$CONFIG:tokens" \
  --source="$demonstrations" --vision="$tokenizers/vision" --out="$WORKDIR/tokens"
# A world model that follows motions needs others than an expert's, where the recipe has such logs.
swerves=""
if grep -q '"swerves"' "$CONFIG"; then swerves="'$WORKDIR/tokens/swerves',"; fi
stage world_model world_model train --config="$CONFIG:world_model" --workdir="$WORKDIR/world_model" \
  --config.data.stores="('$WORKDIR/tokens/train',$swerves)" \
  --config.evaluation.stores="('$WORKDIR/tokens/val',)" \
  --config.tokenizers.text="$tokenizers/text" --config.tokenizers.vision="$tokenizers/vision" \
  --config.tokenizers.action="$tokenizers/action"
if [[ -z "$driving" ]]; then
  # Attempts with outcomes teach what actions do, and what success looks like; then a
  # mixture of tasks, in two parts, gives the checkpoint from which everything below comes.
  for split in attempts attempts_held_out; do
    stage "$split" "$split" evaluate --config="$CONFIG:$split" \
      --checkpoint="$WORKDIR/world_model" --out="$WORKDIR/$split"
  done
  before=world_model
  for part in joint unified; do
    stage "$part" "$part" train --config="$CONFIG:$part" --workdir="$WORKDIR/$part" \
      --config.data.stores="('$WORKDIR/tokens/train', '$WORKDIR/attempts/rollouts')" \
      --config.evaluation.stores="('$WORKDIR/tokens/val', '$WORKDIR/attempts_held_out/rollouts')" \
      --config.init_from="$WORKDIR/$before"
    before="$part"
  done
  stage evaluation evaluation evaluate --config="$CONFIG:evaluate" \
    --checkpoint="$WORKDIR/unified" --out="$WORKDIR/evaluation"
  stage imagination imagination imagine --config="$CONFIG:imagine" \
    --checkpoint="$WORKDIR/unified" --source="$demonstrations" --out="$WORKDIR/imagination"
  stage obedience obedience imagine --config="$CONFIG:obey" --actions=recorded \
    --checkpoint="$WORKDIR/unified" --source="$demonstrations" --out="$WORKDIR/obedience"
else
  stage policy policy train --config="$CONFIG:policy" --workdir="$WORKDIR/policy" \
    --config.data.stores="('$WORKDIR/tokens/train',)" \
    --config.evaluation.stores="('$WORKDIR/tokens/val',)" \
    --config.init_from="$WORKDIR/world_model"
  stage evaluation evaluation evaluate --config="$CONFIG:evaluate" \
    --checkpoint="$WORKDIR/policy" --assets="$demonstrations" --out="$WORKDIR/evaluation"
  stage imagination imagination imagine --config="$CONFIG:imagine" \
    --checkpoint="$WORKDIR/world_model" --source="$demonstrations" --out="$WORKDIR/imagination"
fi
run "$PROJECT_PYTHON" -m univla_jax.summarize --workdir="$WORKDIR"
