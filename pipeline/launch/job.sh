# What a job does outside of its tasks and of any container, where Slurm's commands are. The batch script sources this:
# before the tasks it finds out until when they may run, after them whether the job goes back into the queue.
#
#   before_tasks RUN REQUEUES [next]    the run folder, how often a job may be started again; whether one follows it
#   after_tasks CODE                    the exit code of srun; ends the script

# Of a job of an array: the number alone may stand for the whole array.
alst_job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
alst_errors="$(readlink -f "/proc/$$/fd/2")"
alst_errors_before="$(stat -c %s "$alst_errors" 2> /dev/null || echo 0)"
trap : TERM USR2 # the tasks get them too, and this script has to outlive them

# COMMAND: until it succeeds, for two minutes and more: a controller that starts anew does not answer for a while.
patiently() {
    local attempt
    for attempt in {1..12}; do
        if "$@"; then return 0; fi
        sleep 10
    done
    return 1
}

export ALST_JOB_END ALST_GRACE_SECONDS ALST_KILL_SECONDS
ALST_JOB_END="$(end="$(patiently squeue --noheader --jobs="$alst_job" --format=%e)" # N/A without a limit
    case "$end" in [0-9]*) date -d "$end" +%s ;; esac)"
kill_wait() { scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p'; }
# From the signal of a preemption on: of the QOS or of the partition, whichever preempts here; without one KillWait.
grace_seconds() {
    local grace
    if scontrol show config | grep '^PreemptType *= *preempt/qos' > /dev/null; then
        # Only the accounting tells; [days-]hours:minutes:seconds
        grace="$(sacctmgr --noheader --parsable2 show qos "$SLURM_JOB_QOS" format=GraceTime | tail -n 1 |
            awk -F '[-:]' 'NF > 2 { print (NF > 3 ? 86400 * $1 : 0) + 3600 * $(NF - 2) + 60 * $(NF - 1) + $NF }')"
    else
        grace="$(scontrol show partition "$SLURM_JOB_PARTITION" | sed -n 's/.*GraceTime=\([0-9]*\).*/\1/p')"
    fi
    if [ "${grace:-0}" = 0 ]; then grace="$(kill_wait)"; fi
    echo "$grace"
}
ALST_GRACE_SECONDS="$(grace_seconds)"
# From a SIGTERM on that follows USR2: where a preemption begins with the job's own signal, the grace is over then.
ALST_KILL_SECONDS="$ALST_GRACE_SECONDS"
if scontrol show config | grep '^SlurmctldParameters.*preempt_send_user_signal' > /dev/null; then
    ALST_KILL_SECONDS="$(kill_wait)"
fi

# What did not begin: srun says so itself, and no task has a part in it.
launch_failed() {
    [ -f "$alst_errors" ] && tail -c "+$((alst_errors_before + 1))" "$alst_errors" |
        grep -qE '^srun: error: (Application launch failed|Task launch for .* failed|Unable to create step)'
}

# NODE SINCE: "failed" if it does not answer or was taken out, "rebooted" if its machine has started anew since then.
node_trouble() {
    local told state booted
    told="$(scontrol show node "$1" --oneliner)"
    state="$(sed -n 's/.* State=\([^ ]*\).*/\1/p' <<< "$told")"
    booted="$(sed -n 's/.* BootTime=\([0-9][^ ]*\).*/\1/p' <<< "$told")"
    case "$state" in # one that is POWERED_DOWN saves power
        DOWN | DOWN[+*]* | *FAIL* | *NOT_RESPONDING* | *'*'*) echo failed ;;
        *) if [ -n "$booted" ] && [ "$(date -d "$booted" +%s)" -gt "$2" ]; then echo rebooted; fi ;;
    esac
}

# BAD NODES: how many of a start's nodes; so many have a cause that they share, and other nodes may share it too.
share_a_cause() { [ "$1" -gt 1 ] && [ "$((2 * $1))" -ge "$2" ]; }

# Slurm took this start away for the sake of another job.
preempted() {
    local told at since
    told="$(patiently scontrol show job "$alst_job")"
    at="$(sed -n 's/.* PreemptTime=\([0-9][^ ]*\).*/\1/p' <<< "$told")"
    since="$(sed -n 's/.* StartTime=\([0-9][^ ]*\).*/\1/p' <<< "$told")"
    [ -n "$at" ] && [[ ! "$at" < "$since" ]]
}

# The newest checkpoint; step-0 if there is none.
newest_step() {
    local step
    step="$(ls "$alst_run/checkpoints" 2> /dev/null | grep '^step-[0-9]*$' | tail -n 1)"
    echo "${step:-step-0}"
}

# STEP: three times on end this job came back, not by preemption, and it has got no further than it was then.
is_stuck() {
    local rows
    rows="$(grep -sF " job $alst_job: " "$alst_run/slurm/requeues" | tail -n 3 | grep -v ': preempted$')"
    [ "$(grep -cF " $1 job " <<< "$rows")" = 3 ]
}

# WHY: the job has failed; the remedy comes last. Ends the script.
give_up() {
    echo "alst: $*, and go on with \`alst resume $(basename "$alst_run")\`" >&2
    exit 1
}

# REASON CODE: put the job back, without the nodes that failed; or say why not. Ends the script.
requeue() {
    local excluded before step
    step="$(newest_step)"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$alst_requeues" ]; then
        give_up "$1; requeues = $alst_requeues in the cluster's profile, and this job was started again" \
            "${SLURM_RESTART_COUNT:-0} times: raise it there"
    fi
    if [ "$1" != preempted ] && is_stuck "$step"; then
        give_up "$1; this job was started again 3 times, and no checkpoint is newer than $step: mend the cause"
    fi
    rm -f "$alst_run/slurm/nodes-$SLURM_JOB_ID"
    echo "$(date '+%Y-%m-%d %H:%M:%S') $step job $alst_job: $1" >> "$alst_run/slurm/requeues"
    trap '' TERM # requeued means ended here; what is left to say is said by processes that inherit this
    patiently scontrol requeue "$alst_job" || exit 1 # a job that cannot go on has failed
    if [ -s "$alst_run/slurm/excluded" ]; then
        excluded="$(cut -d' ' -f1 "$alst_run/slurm/excluded" | sort -u | paste -sd,)"
        before="$(scontrol show job "$alst_job" | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')"
        scontrol update "JobId=$alst_job" "ExcNodeList=$before${before:+,}$excluded"
    fi
    exit "$2"
}

# SINCE OFFSET NODES: those of an earlier start that failed; srun names what it has lost, and may be lost itself.
failed_nodes() {
    local node lost= number=0 rebooted=()
    if [ -f "$alst_errors" ]; then
        lost="$(tail -c "+$(($2 + 1))" "$alst_errors" | sed -n 's/^srun: error: Node failure on \([^ ]*\).*/\1/p')"
    fi
    for node in $lost; do scontrol show hostnames "$node"; done
    for node in $(scontrol show hostnames "$3"); do
        number="$((number + 1))"
        case "$(node_trouble "$node" "$1")" in
            failed) echo "$node" ;;
            rebooted) rebooted+=("$node") ;;
        esac
    done
    # The job may have waited while all were maintained.
    if [ "$((2 * ${#rebooted[@]}))" -lt "$number" ]; then printf '%s\n' "${rebooted[@]}"; fi
}

# SINCE OFFSET NODES: no later job of the run gets those of an earlier start that failed.
exclude_failed() {
    local node failed
    mapfile -t failed < <(failed_nodes "$@" | grep . | sort -u)
    if share_a_cause "${#failed[@]}" "$(scontrol show hostnames "$3" | wc -l)"; then
        echo "${failed[*]} failed together under job $alst_job: none is excluded"
        return
    fi
    for node in "${failed[@]}"; do
        echo "$node $(date '+%Y-%m-%d %H:%M:%S') failed under job $alst_job" >> "$alst_run/slurm/excluded"
    done
}

before_tasks() {
    local began="$1/slurm/nodes-$SLURM_JOB_ID" since offset nodes node
    alst_run="$1" alst_requeues="$2" alst_next="${3:-}"
    if [ -s "$began" ]; then # Slurm itself ended the start before: a node failed, a preemption, scontrol requeue
        read -r since offset nodes < "$began"
        exclude_failed "$since" "$offset" "$nodes"
        if [ "${SLURM_RESTART_COUNT:-0}" -gt "$alst_requeues" ]; then requeue "ended by Slurm" 1; fi
    fi
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if grep -qs "^$node " "$alst_run/slurm/excluded"; then requeue "node $node failed before" 1; fi
    done
    rm -f "$alst_run/slurm/requeue-$SLURM_JOB_ID" # of a start that Slurm ended
    echo "$(date +%s) $alst_errors_before $SLURM_JOB_NODELIST" > "$began"
    alst_excluded_before="$(cat "$alst_run/slurm/excluded" 2> /dev/null | wc -l)"
}

# REASON: ends the script where the nodes that this start found unfit share a cause; they would all go, one by one.
check_excluded() {
    local excluded="$alst_run/slurm/excluded" unfit
    unfit="$(tail -qn "+$((alst_excluded_before + 1))" "$excluded" 2> /dev/null | cut -d' ' -f1 | sort -u | wc -l)"
    if share_a_cause "$unfit" "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | wc -l)"; then
        sed -i "$((alst_excluded_before + 1)),\$d" "$excluded"
        give_up "$1; $unfit nodes of this start are not fit, so that none is excluded: mend what they share"
    fi
}

after_tasks() {
    local code="$1" mark="$alst_run/slurm/requeue-$SLURM_JOB_ID" reason= state
    # Slurm ends it: a node failed, it was cancelled, its time is over. Requeued by us it would come back to life.
    state="$(patiently squeue --noheader --jobs="$alst_job" --format=%T)" || state=RUNNING
    if [ "$state" != RUNNING ]; then
        rm -f "$mark"
        exit "$code"
    fi
    rm -f "$alst_run/slurm/nodes-$SLURM_JOB_ID"
    if [ -e "$mark" ]; then
        reason="$(cat "$mark")"
        reason="${reason:-its last words were lost, the disk may be full}"
        rm -f "$mark"
    elif [ "$code" != 0 ] && launch_failed; then
        reason="its tasks could not be launched"
    elif [ "$code" != 0 ]; then
        reason=preempted # a task that does not listen is ended by it
    fi
    if [ -z "$reason" ]; then exit "$code"; fi
    # Where a cluster preempts with the job's own signal, a task cannot know why it came.
    if [ "$reason" = "asked to stop by SIGUSR2" ] && preempted; then reason=preempted; fi
    # All tasks ended well, saved: the next job of the chain has waited long enough.
    if [ -n "$alst_next" ] && [ "$code" = 0 ]; then exit 0; fi
    # SIGTERM has other causes.
    if [ "$reason" = preempted ] && ! preempted; then exit "$code"; fi
    check_excluded "$reason"
    requeue "$reason" "$code"
}
