#!/bin/bash
# Submits the whole pipeline. Runs on a login node; do not sbatch this file:
#     slurm/pipeline.sh CONFIG [key=value ...]
# The stages are those of `electra run`: evaluate only where evaluate.tasks names some.
#
# SBATCH_* variables reach all jobs. For one stage:
#     ELECTRA_TOKENIZE_SBATCH, ELECTRA_PRETRAIN_SBATCH, ELECTRA_EVALUATE_SBATCH    more sbatch flags,
#                              e.g. ELECTRA_TOKENIZE_SBATCH="--array=0-7" to tokenize on eight nodes,
#                              ELECTRA_PRETRAIN_SBATCH="--nodes=2 --time=12:00:00"
#     ELECTRA_PRETRAIN_SCRIPT  the job script of pretraining; by default CONFIG's name chooses the size
set -euo pipefail
slurm=$(dirname -- "$(readlink -f -- "$0")")
repo=$(dirname -- "$slurm")
# shellcheck source=slurm/_common.sh
source "$slurm/_common.sh"

if (($# == 0)) || [[ $1 == -* || ($1 == *=* && ! -f $1) ]]; then
  echo "usage: slurm/pipeline.sh CONFIG [key=value ...]" >&2
  exit 64
fi
config=$1
shift
if [[ ! -f $config && -f $repo/$config ]]; then config=$repo/$config; fi
if [[ ! -f $config ]]; then
  echo "$config: no such file, neither in $PWD nor in $repo" >&2
  exit 78
fi
config=$(readlink -f -- "$config")

case $(basename -- "$config") in
  *large*) size=large ;;
  *base*) size=base ;;
  *) size=small ;;
esac
pretrain=${ELECTRA_PRETRAIN_SCRIPT:-$slurm/pretrain_$size.sh}

# Inside an allocation, the new jobs would inherit this one's shape.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  for name in "${!SLURM_@}"; do
    if [[ $name != SLURM_CONF && $name != SLURM_CLUSTERS ]]; then unset "$name"; fi
  done
fi
export ELECTRA_REPO=$repo

# The program knows the stages, and refuses wrong keys before anything waits in the queue, if its Python works on a login
# node. In a subshell: jobs load the site's settings themselves.
stages_of() {
  (load_site_settings) || return 1
  load_site_settings
  if ((${#ELECTRA_SRUN_FLAGS[@]})); then return 1; fi # an image that only srun can start
  "${python[@]}" -m pipeline config "$@" --stages
}
status=0
stages=$(stages_of "$config" "$@") || status=$?
if [[ $status == 64 || $status == 78 ]]; then exit "$status"; fi
if ((status)); then
  echo "the program does not run here ($status): all stages are submitted, and the jobs check them" >&2
  stages="tokenize pretrain evaluate"
fi

jobs=()
submit() { # submit "SBATCH FLAGS" SCRIPT ARGUMENTS: one more job, to start when the one before has succeeded
  local flags answer left="nothing was left in the queue"
  read -ra flags <<<"$1"
  if ((${#jobs[@]})); then
    flags+=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
  fi
  if ! answer=$(sbatch --parsable "${flags[@]}" "${@:2}"); then
    if ((${#jobs[@]})) && ! scancel "${jobs[@]}"; then left="${jobs[*]} could not be cancelled"; fi
    echo "sbatch refused $2; $left" >&2
    exit 1
  fi
  jobs+=("${answer%%;*}") # "id" or "id;cluster"
}
submit "${ELECTRA_TOKENIZE_SBATCH:-}" "$slurm/tokenize.sh" "$config" "$@"
submit "${ELECTRA_PRETRAIN_SBATCH:-}" "$pretrain" "$config" "$@"
if [[ $stages == *evaluate* ]]; then
  submit "${ELECTRA_EVALUATE_SBATCH:-}" "$slurm/evaluate.sh" "$config" "$@"
fi

echo "tokenize ${jobs[0]}"
echo "pretrain ${jobs[1]} after ${jobs[0]} ($(basename -- "$pretrain"))"
if ((${#jobs[@]} == 3)); then
  echo "evaluate ${jobs[2]} after ${jobs[1]}"
else
  echo "evaluate is not submitted: evaluate.tasks is empty"
fi
