# shellcheck shell=bash
# Sourced by the job scripts, which set $repo. run_stage reads from top to bottom as the story of one job.
set -euo pipefail

stop_requested= # the time limit is near (Slurm sent USR2 to this shell) or reached (TERM)
cancelled=      # scancel or preemption: Slurm sent TERM to the shell and to the step
is_settled=     # whether to requeue is decided once
meetings=0      # how often ranks were started in this allocation
status=0 reason= # how the last step ended
account=        # process that closes the run's account
log=$(readlink "/proc/$$/fd/1") log_bytes=0 # where this shell writes to; its size when the last step began

# Codes after which the same ranks would end the same way, or have nothing left to do; those that repeating cannot mend.
readonly FINAL='^(0|64|65|78|85|93)$' GRAVE='^(64|65|78|93)$'

# run_stage STAGE DEFAULT_CONFIG [CONFIG] [key=value ...]
run_stage() {
  stage=$1 config=$2 arguments=("${@:3}")
  forget_outer_job
  load_site_settings
  choose_config
  announce
  describe_allocation
  refuse_after_failed_generation
  trap pass_on_stop USR2
  trap end_on_term TERM
  preflight
  quick_check
  stage_shards
  launch
  finish
}

say() { echo "[slurm] $*"; }

is_told_to_stop() { [[ $stop_requested || $cancelled ]]; }

refuse() { # refuse EXIT_CODE MESSAGE
  echo "$2" >&2
  exit "$1"
}

# sbatch passes on the variables of the shell it was called from. Those of another job's step, or of torchrun,
# would make this batch shell look like a rank.
forget_outer_job() {
  unset SLURM_STEP_ID SLURM_STEPID SLURM_STEP_NUM_TASKS RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
  unset MASTER_ADDR MASTER_PORT ELECTRA_JOB_END_TIME
}

load_site_settings() {
  local site=${ELECTRA_SITE_ENV:-$repo/slurm/site.env}
  ELECTRA_SRUN_FLAGS=()
  if [[ -f $site ]]; then
    set +eu # module files and activate scripts are seldom written for strict mode
    # shellcheck source=/dev/null
    source "$site"
    set -eu
  fi
  if [[ -n ${ELECTRA_PYTHON:-} ]]; then
    python=("${ELECTRA_PYTHON[@]}") # may be an array: a container's exec command and its python
  elif [[ -z ${VIRTUAL_ENV:-} && -x $repo/.venv/bin/python ]]; then
    python=("$repo/.venv/bin/python")
  else
    python=(python3)
  fi
  command -v "${python[0]}" >/dev/null ||
    refuse 78 "no ${python[0]} on $(hostname): set ELECTRA_PYTHON in slurm/site.env"
  on_batch_host=("${python[@]}") # one process, beside the step
  if ((${#ELECTRA_SRUN_FLAGS[@]})); then # e.g. an image that only srun can start
    on_batch_host=(srun --export=ALL --nodes=1 --ntasks=1 "${ELECTRA_SRUN_FLAGS[@]}" "${python[@]}")
  fi
  # The code of this checkout, and never a folder "model" or "pipeline" that lies in the submit directory.
  export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
}

# The first argument is CONFIG, unless it reads as key=value. It is looked up in the submit directory, then in
# the repository.
choose_config() {
  if ((${#arguments[@]})) && [[ ${arguments[0]} != *=* || -f ${arguments[0]} ]]; then
    config=${arguments[0]} arguments=("${arguments[@]:1}")
  fi
  [[ -n $config ]] || refuse 64 "$stage: CONFIG is missing, e.g. sbatch slurm/$stage.sh configs/small.yaml"
  if [[ ! -f $config && -f $repo/$config ]]; then config=$repo/$config; fi
  [[ -f $config ]] || refuse 78 "$config: no such file, neither in $PWD nor in $repo"
}

announce() {
  local commit
  commit=$(git -C "$repo" rev-parse --short HEAD 2>/dev/null) || commit=unknown
  say "$(date +%Y-%m-%dT%H:%M:%S%z) job=${SLURM_JOB_ID:-none} restart=${SLURM_RESTART_COUNT:-0}" \
    "nodes=${SLURM_JOB_NODELIST:-$(hostname)} tasks=${SLURM_NTASKS:-1} commit=$commit"
  local shown=() argument
  for argument in "${arguments[@]}"; do # a tracking URI may hold a password
    if [[ $argument == tracking.uri=* ]]; then argument=tracking.uri=...; fi
    shown+=("$argument")
  done
  say "$stage $config ${shown[*]}"
}

# For the program: which start of which job this is, since when, and until when (nothing: no limit, or not known).
describe_allocation() {
  local job end=${SLURM_JOB_END_TIME:-}
  ELECTRA_ALLOCATION=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}@$(date +%s)
  export ELECTRA_ALLOCATION
  if [[ -z $end ]]; then # not set by every version of Slurm
    job=$(scontrol show job "$(own_id)") || job=
    if [[ $job =~ EndTime=([0-9T:-]+) ]]; then end=$(date --date="${BASH_REMATCH[1]}" +%s) || end=; fi
  fi
  if [[ -n $end ]]; then export ELECTRA_JOB_END_TIME=$end; fi
}

# One element of a job array has the array's own id, by which Slurm understands all elements.
own_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Slurm warns the batch shell only (--signal=B:USR2@300). scancel without --batch reaches the steps only.
pass_on_stop() {
  stop_requested=yes
  say "the time limit is near: asking the step to save and stop"
  scancel --signal=USR2 "$(own_id)" || say "no step to signal"
}

# TERM at the time limit: a save took longer than Slurm's warning, or something hangs. Slurm kills this shell together
# with what hangs, so the requeue comes first; the step may save until then.
end_on_term() {
  if is_at_limit; then
    stop_requested=yes
    requeue "reached its time limit"
  else
    cancelled=yes
  fi
}

# Slurm's own word: a clock does not know of a limit that was changed since, and would requeue a job that was cancelled.
is_at_limit() {
  local job
  job=$(scontrol show job "$(own_id)") || job=
  [[ $job =~ Reason=TimeLimit[[:space:]] ]]
}

# A few seconds: what cannot work ends here, before the step holds every node.
preflight() {
  "${on_batch_host[@]}" -m pipeline "$stage" "$config" "${arguments[@]}" --check ||
    status=$? reason="the check failed on ${SLURMD_NODENAME:-$(hostname)}"
  pass_or_end
}

# A check that fails at a job's first start is the user's to look at. Later it is one more loss: what was right then and
# is wrong now is the node's doing (a GPU that has gone), or the storage's.
pass_or_end() {
  if ((status == 0)) || { is_told_to_stop && [[ ! $status =~ $GRAVE ]]; }; then return; fi
  if ((${SLURM_RESTART_COUNT:-0} == 0)); then exit "$status"; fi
  if ((status == 78)); then status=1; fi
  if [[ $status =~ $FINAL ]]; then exit "$status"; fi
  finish
}

# Rank 0 runs on the job's first node. The port differs between jobs, between the starts of one job, and between the
# steps of one start.
set_meeting_point() {
  local nodes node
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${nodes%%$'\n'*}
  node=$(scontrol show node "$MASTER_ADDR") || node=
  if [[ $node =~ NodeAddr=([^[:space:]]+) ]]; then MASTER_ADDR=${BASH_REMATCH[1]}; fi
  MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0} + 613 * meetings) % 20000))
  export MASTER_ADDR=${ELECTRA_MASTER_ADDR:-$MASTER_ADDR} MASTER_PORT
  meetings=$((meetings + 1))
}

# Whether the nodes can work together, before a long run relies on it.
quick_check() {
  if [[ $stage != pretrain || ${SLURM_NNODES:-1} == 1 || ${ELECTRA_QUICK_CHECK:-1} == 0 ]]; then return; fi
  if is_told_to_stop; then return; fi
  run_step --kill-on-bad-exit=1 --wait=60 --unbuffered -- acceptance --quick "$config" "${arguments[@]}"
  if ((status)) && ! is_told_to_stop; then
    name_lost_node
    say "the quick check failed ($status); ELECTRA_QUICK_CHECK=0 leaves it out"
    if [[ ! $status =~ $FINAL ]]; then status=1; fi
  fi
  pass_or_end
}

# One process on each node copies the run's shards to the node's own disk. That saves time and no more: what
# goes wrong here is said, and a rank that finds no whole copy reads the originals.
stage_shards() {
  if [[ $stage != pretrain || -z ${ELECTRA_STAGE_DIR:-} ]] || is_told_to_stop; then return; fi
  say "staging shards to $ELECTRA_STAGE_DIR on each node"
  run_step --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    -- shards stage "$config" "${arguments[@]}" --to "$ELECTRA_STAGE_DIR"
  if ((status)); then say "WARNING: staging failed ($status); nodes without copies read from shared storage"; fi
  arguments+=("data.local_dir=$ELECTRA_STAGE_DIR")
}

# A pretraining that lost a process goes on from its checkpoint in the allocation that it has, a few times.
launch() {
  local restarts=0 most=0
  if [[ $stage == pretrain ]]; then most=${ELECTRA_RESTARTS:-3}; fi
  status=85 reason=
  while ! is_told_to_stop; do
    run_step --kill-on-bad-exit=1 --wait=60 --unbuffered -- "$stage" "$config" "${arguments[@]}"
    # What was right at the first start and is wrong now is the node's doing: a GPU that has gone.
    if ((status == 78 && restarts + ${SLURM_RESTART_COUNT:-0} > 0)); then status=1; fi
    if [[ $status =~ $FINAL ]] || is_told_to_stop; then return; fi
    name_lost_node
    if ((restarts >= most)); then return; fi
    restarts=$((restarts + 1))
    say "$stage was lost (exit code $status); starting it again in this allocation: $restarts of at most $most"
  done
}

# run_step SRUN_FLAGS -- ARGUMENTS: the program as a step of the job; sets status and reason.
# In the background, since bash runs a trap only between commands or in `wait`. A trap cuts `wait` short, so
# it is repeated while srun lives; the last one returns srun's own code.
run_step() {
  local flags=()
  while [[ $1 != -- ]]; do flags+=("$1") && shift; done
  set_meeting_point
  export ELECTRA_EXIT_FILE
  ELECTRA_EXIT_FILE=$PWD/.electra-exit-$(own_id)
  rm -f -- "$ELECTRA_EXIT_FILE"
  log_bytes=$(stat --format=%s -- "$log" 2>/dev/null) || log_bytes=0
  # srun does not take over sbatch's --cpus-per-task in every version. --export=ALL: without it the ranks have
  # no environment after sbatch --export=NONE.
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  srun --export=ALL "${flags[@]}" "${ELECTRA_SRUN_FLAGS[@]}" "${python[@]}" -m pipeline "${@:2}" &
  while kill -0 $! 2>/dev/null; do wait $! || true; done
  status=0 reason=
  wait $! || status=$?
  read_exit_file
}

# srun returns the largest code of its tasks, or that of the signal by which it ended the others after the first.
# The program leaves its own code and the reason in a file.
read_exit_file() {
  local code
  ls -a -- "$PWD" >/dev/null # else NFS may remember for half a minute that the file was not there
  if ((status)) && read -r code reason 2>/dev/null <"$ELECTRA_EXIT_FILE" && [[ $code =~ $FINAL ]]; then
    status=$code
  elif ((status == 85)) && ! is_told_to_stop; then
    status=1 # only told to stop, while it was starting, since another task had failed
  fi
  rm -f -- "$ELECTRA_EXIT_FILE"
}

# What the step's part of the log says of the node that failed first, as a hint: the ranks' own judgement of who is
# silent or behind, else srun's first complaint, which may stand behind an unfinished line of theirs.
name_lost_node() {
  local line node='' judged='(no sign of life for [0-9]+ s of|behind are) rank [0-9]+ on ([^ .]+)'
  local failed='srun: error: (Node failure on ([^ ]+)|([^][ :]+): task [0-9]+: )'
  [[ -f $log ]] || return 0
  while IFS= read -r line; do
    if [[ $line == *"the same command goes on from"* ]]; then return; fi # all ended together, and say why themselves
    if [[ $line =~ $judged ]]; then node=${BASH_REMATCH[2]} && break; fi
    if [[ -z $node && $line =~ $failed ]]; then node=${BASH_REMATCH[2]}${BASH_REMATCH[3]}; fi
  done < <(tail --bytes=+$((log_bytes + 1)) -- "$log")
  if [[ -z $node ]]; then return; fi
  say "node $node failed first. To go on without it:" \
    "scontrol update JobId=$(own_id) ExcNodeList=$node (when requeued), or sbatch --exclude=$node ..."
}

finish() {
  local is_lost=
  trap 'is_at_limit || cancelled=yes' TERM # what it means for a requeue is decided below
  trap '' USR2 # there is no step to pass it on to
  say "$(date +%Y-%m-%dT%H:%M:%S%z) $stage ended with exit code $status${reason:+: $reason}"
  # Killed by a signal while stopping: a rank was still starting up, or srun ended the others after the first.
  # Whatever it was, the newest checkpoint is whole.
  if [[ $stop_requested && $status =~ ^(137|140|143)$ ]]; then status=85; fi
  if [[ $stage == pretrain && ! $status =~ $FINAL ]]; then is_lost=yes; fi
  close_account
  if [[ $reason == held:* ]]; then
    say "not requeued; submit again when the file is removed"
  elif ((status == 85)); then
    requeue "stopped early"
  elif [[ $is_lost ]]; then
    requeue "was lost"
  fi
  if [[ $is_lost ]]; then status=1; fi
  if is_in_chain && [[ $status =~ $GRAVE ]]; then
    echo "$status ${reason:-see $log}" >"$(chain_file)"
  fi
  [[ ! $account ]] || wait "$account" || say "the last seconds of this allocation are missing in the run's account"
  exit "$status"
}

# Seconds since the ranks' last sign of life are in nobody's account yet (pipeline/goodput.py). TERM cuts `wait` short:
# Slurm leaves half a minute then, so the requeue comes before what slow storage may still take.
close_account() {
  if [[ $stage != pretrain ]]; then return; fi
  timeout --kill-after=5 60 "${on_batch_host[@]}" -m pipeline.goodput "$status" "$config" "${arguments[@]}" &
  account=$!
  wait "$account" || true
}

# requeue WHAT_HAPPENED: what is saved is on disk by now, so it does no harm that Slurm kills this shell as soon as it
# has accepted. Nothing but pretraining counts its progress (93), so other stages may go on less often.
requeue() {
  local restarts=${SLURM_RESTART_COUNT:-0} most=${ELECTRA_MAX_REQUEUES:-100}
  if [[ $stage != pretrain ]]; then most=${ELECTRA_MAX_REQUEUES:-20}; fi
  if [[ $is_settled ]]; then return; fi
  is_settled=yes
  if [[ $cancelled ]]; then
    say "$1, told to end by scancel or a preemption: it does not requeue itself"
  elif [[ $stage == acceptance ]]; then
    say "$1; acceptance is never requeued: submit again, with more time if it was the limit"
  elif is_in_chain; then
    say "$1; the chain's next generation goes on from the checkpoint"
  elif ((restarts >= most)); then
    say "$1; not requeued: already restarted $restarts times (ELECTRA_MAX_REQUEUES=$most); submit again to go on"
  else
    say "$1; requeueing, to go on from the checkpoint: restart $((restarts + 1)) of at most $most"
    scontrol requeue "$(own_id)" || say "Slurm refused the requeue; submit again to go on"
  fi
}

# The generations of a chain (chain.sh) start one after the other, however the one before ended. They are known by their
# name: it reaches a job whatever SBATCH_EXPORT says.
is_in_chain() { [[ ${SLURM_JOB_NAME:-} == electra-chain-* ]]; }

chain_file() { echo ".$SLURM_JOB_NAME"; }

refuse_after_failed_generation() {
  local code why
  if ! is_in_chain || [[ ! -s $(chain_file) ]]; then return; fi
  read -r code why <"$(chain_file)"
  refuse "$code" "an earlier generation of this chain ended with $code: $why; submit a new chain to go on"
}
