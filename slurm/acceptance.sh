#!/bin/bash
# Can this cluster be trusted? Asked on two nodes, before a long run; fifteen minutes are expected, 40 are the limit:
#     sbatch slurm/acceptance.sh [CONFIG] [key=value ...]
# Needs no corpus. The verdict is the last line of the log, the report lies in <run.dir>/acceptance.
# Flags before the script's name replace header lines: sbatch --account=A --nodes=8 --gpus-per-node=4 ...
#SBATCH --job-name=electra-acceptance
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=00:40:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR2@300
#SBATCH --kill-on-invalid-dep=yes
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"

# Slurm runs a copy of this file from its spool folder. Where it came from stands in the job's "Command": the
# path given to sbatch, relative to the submit directory, and the arguments. Same lines in every job script.
find_repository() {
  local job script=$0 folder folders
  job=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>&1) || job=
  if [[ $job =~ Command=([^$'\n']*) ]]; then script=${BASH_REMATCH[1]%" $*"}; fi
  folders=("$(readlink -m -- "$script")" "$(readlink -m -- "$0")")
  folders=("${folders[@]%/slurm/*}" "$PWD")
  if [[ -n ${ELECTRA_REPO:-} ]]; then folders=("$ELECTRA_REPO"); fi
  for folder in "${folders[@]}"; do
    if [[ -f $folder/pipeline/__main__.py ]]; then readlink -f -- "$folder" && return; fi
  done
  echo "no pipeline/__main__.py in ${folders[*]}: export ELECTRA_REPO=<electra checkout> and submit again" >&2
  return 78
}
repo=$(find_repository "$@")
# shellcheck source=slurm/_common.sh
source "$repo/slurm/_common.sh"

run_stage acceptance configs/small.yaml "$@"
