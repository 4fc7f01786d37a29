# What both job scripts share: when a job ends at once, how it hears that its time is up, and when it comes back.
# The script sets run, base, requeue, max_restarts and notice_seconds before it reads this file.
#
# Codes of the trainers: 0 with RUN/done, the run is finished; 0 without, it stopped early and has saved; 2 3 4 7 73,
# a named failure that the same start would meet again; anything else, a crash.

# Before anything that takes time: until there is a trap, USR1 would end this shell, and the job with it.
attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export HYDRA_SCALE_STOP_FILE=$run/launch/$attempt.stop
heard='' code=0 stop_at=()

# An element of an array under the name by which squeue shows it.
shown=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
shown=${shown:-$SLURM_JOB_ID}

note() { printf '%s job %s.%s: %s\n' "$(date +%FT%T%z)" "$shown" "${SLURM_RESTART_COUNT:-0}" "$*" | tee -a "$run/launch/history.log"; }

hear() {
  heard=$1
  mkdir -p "$run/launch"
  : >"$HYDRA_SCALE_STOP_FILE"
  note "SIG$1: the trainers are asked to save and stop"
}

trap 'hear USR1' USR1
trap 'hear TERM' TERM

export HYDRA_SCALE_MASTER_ADDR=${HYDRA_SCALE_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then stop_at=(--stop-at $((SLURM_JOB_END_TIME - notice_seconds))); fi

begin() {
  mkdir -p "$run/launch"
  if [ -e "$run/done" ]; then note 'the run is done already'; exit 0; fi
  if [ -e "$run/stop-request" ]; then note 'not started: a stop is requested'; exit 75; fi
  note "starts on $SLURM_JOB_NODELIST"
}

set_up_failed() { # a module that is not there, say: the trainers would start without it
  note "not started: \`$*\` failed on $(hostname): the error stands above; correct the site file and launch again"
  exit 2
}

watch() { # wait for process $1; a signal ends bash's wait early, so it is repeated until the process is gone
  while wait "$1"; code=$?; [ "$code" -gt 128 ]; do
    if ! kill -0 "$1" 2>/dev/null; then
      wait "$1"
      code=$?
      break
    fi
  done
}

newest_step() { # of the published checkpoints, by number
  local name
  name=$(cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-* | grep -E '^step-[0-9]{8}$' | sort | tail -n 1)
  name=${name#step-}
  echo $((10#${name:-0}))
}

restarts_without_progress() { # counts this one, in RUN/launch/restarts: "newest step" "restarts since"
  local step before=-1 count=0
  step=$(newest_step)
  [ ! -e "$run/launch/restarts" ] || read -r before count <"$run/launch/restarts"
  if [ "$step" -gt "$before" ]; then count=0; fi
  echo "$step $((count + 1))" >"$run/launch/restarts"
  echo "$count"
}

finish() {
  if [ -e "$run/done" ]; then note 'the run is done'; exit 0; fi
  # srun gives the largest code of its tasks, so that of a task killed for another's failure hides the failure itself.
  if [ -s "$run/launch/$attempt.code" ]; then read -r code <"$run/launch/$attempt.code"; fi
  case $code in
    2 | 3 | 4 | 7 | 73) note "failed with code $code, which a restart does not cure: the error stands above"; exit "$code" ;;
    0) note "stopped early at step $(newest_step)"; code=75 ;;
    *) note "the trainers ended with code $code; newest checkpoint: step $(newest_step)" ;;
  esac
  if [ -e "$run/stop-request" ]; then note 'not requeued: a stop is requested'; exit "$code"; fi
  # TERM is Slurm's own end of this attempt: after a preemption or requeue it brings the job back, after scancel not.
  if [ "$heard" = TERM ]; then exit "$code"; fi
  if [ "$requeue" = no ]; then note 'a later job of the chain continues'; exit "$code"; fi
  local count
  count=$(restarts_without_progress)
  if [ "$count" -ge "$max_restarts" ]; then
    note "gave up: $max_restarts restarts without a new checkpoint"
    exit "$code"
  fi
  note 'requeued'
  scontrol requeue "$shown" # of an array this element alone
  exit "$code"
}
