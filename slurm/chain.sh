#!/bin/bash
# Submits K jobs of one script, of which each starts when the one before has ended and goes on where it was: for
# sites that allow no requeue. Runs on a login node; do not sbatch this file:
#     slurm/chain.sh K SCRIPT [CONFIG] [key=value ...]
#
# SBATCH_* variables reach all of them. ELECTRA_CHAIN_SBATCH holds more sbatch flags, e.g. "--nodes=2 --time=12:00:00"
# A generation after the run's end finds it up to date. One after an end that repeating cannot mend (exit codes 64, 65,
# 78, 93) does not train.
set -euo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: slurm/chain.sh K SCRIPT [CONFIG] [key=value ...]" >&2
  exit 64
fi
generations=$1 script=$2
shift 2
if [[ ! -f $script ]]; then
  echo "$script: no such job script" >&2
  exit 78
fi

# Inside an allocation, the new jobs would inherit this one's shape.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  for name in "${!SLURM_@}"; do
    if [[ $name != SLURM_CONF && $name != SLURM_CLUSTERS ]]; then unset "$name"; fi
  done
fi

# Slurm lets one of the user's jobs of this name run at a time. By its beginning a job knows that it is in a chain.
name=$(basename -- "$script" .sh)
chain=electra-chain-${name#pretrain_}-$(date +%m%d%H%M%S)-$$
read -ra flags <<<"${ELECTRA_CHAIN_SBATCH:-}"
flags+=("--job-name=$chain" --dependency=singleton --no-requeue)

jobs=()
for ((generation = 1; generation <= generations; generation++)); do
  if ! answer=$(sbatch --parsable "${flags[@]}" "$script" "$@"); then
    left="nothing was left in the queue"
    if ((${#jobs[@]})) && ! scancel "${jobs[@]}"; then left="${jobs[*]} could not be cancelled"; fi
    echo "sbatch refused $script; $left" >&2
    exit 1
  fi
  jobs+=("${answer%%;*}") # "id" or "id;cluster"
done
echo "$chain ${jobs[*]}"
