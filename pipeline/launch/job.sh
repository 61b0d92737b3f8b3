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

export ALST_JOB_END ALST_GRACE_SECONDS
ALST_JOB_END="$(end="$(squeue --noheader --jobs="$alst_job" --format=%e)" # N/A without a limit
    case "$end" in [0-9]*) date -d "$end" +%s ;; esac)"
ALST_GRACE_SECONDS="$(scontrol show partition "$SLURM_JOB_PARTITION" | sed -n 's/.*GraceTime=\([1-9][0-9]*\).*/\1/p')"
if [ -z "$ALST_GRACE_SECONDS" ]; then
    ALST_GRACE_SECONDS="$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')"
fi

# What did not begin: srun says so itself, and no task has a part in it.
launch_failed() {
    [ -f "$alst_errors" ] && tail -c "+$((alst_errors_before + 1))" "$alst_errors" |
        grep -qE '^srun: error: (Application launch failed|Task launch for .* failed|Unable to create step)'
}

# NODE SINCE: it does not answer, was taken out, or its machine has started anew since then.
node_failed() {
    local told state booted
    told="$(scontrol show node "$1" --oneliner)"
    state="$(sed -n 's/.* State=\([^ ]*\).*/\1/p' <<< "$told")"
    booted="$(sed -n 's/.* BootTime=\([0-9][^ ]*\).*/\1/p' <<< "$told")"
    case "$state" in *DOWN* | *FAIL* | *NOT_RESPONDING* | *'*'*) return 0 ;; esac
    [ -n "$booted" ] && [ "$(date -d "$booted" +%s)" -gt "$2" ]
}

# REASON CODE: put the job back, without the nodes that failed; or say why not. Ends the script.
requeue() {
    local excluded before
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$alst_requeues" ]; then
        echo "alst: $1; requeues = $alst_requeues in the cluster's profile, and this job was started again" \
            "${SLURM_RESTART_COUNT:-0} times: raise it there, and go on with \`alst resume $(basename "$alst_run")\`" >&2
        exit 1
    fi
    rm -f "$alst_run/slurm/nodes-$SLURM_JOB_ID"
    echo "$(date '+%Y-%m-%d %H:%M:%S') job $alst_job: $1" >> "$alst_run/slurm/requeues"
    trap '' TERM # requeued means ended here; what is left to say is said by processes that inherit this
    scontrol requeue "$alst_job" || exit 1 # a job that cannot go on has failed
    if [ -s "$alst_run/slurm/excluded" ]; then
        excluded="$(cut -d' ' -f1 "$alst_run/slurm/excluded" | sort -u | paste -sd,)"
        before="$(scontrol show job "$alst_job" | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')"
        scontrol update "JobId=$alst_job" "ExcNodeList=$before${before:+,}$excluded"
    fi
    exit "$2"
}

# SINCE OFFSET NODES: those of an earlier start that failed; srun names what it has lost, and may be lost itself.
failed_nodes() {
    local node lost=
    if [ -f "$alst_errors" ]; then
        lost="$(tail -c "+$(($2 + 1))" "$alst_errors" | sed -n 's/^srun: error: Node failure on \([^ ]*\).*/\1/p')"
    fi
    for node in $lost; do scontrol show hostnames "$node"; done
    for node in $(scontrol show hostnames "$3"); do
        if node_failed "$node" "$1"; then echo "$node"; fi
    done
}

before_tasks() {
    local began="$1/slurm/nodes-$SLURM_JOB_ID" since offset nodes node
    alst_run="$1" alst_requeues="$2" alst_next="${3:-}"
    if [ -s "$began" ]; then # Slurm itself ended the start before: a node failed, a preemption, scontrol requeue
        read -r since offset nodes < "$began"
        for node in $(failed_nodes "$since" "$offset" "$nodes" | sort -u); do
            echo "$node $(date '+%Y-%m-%d %H:%M:%S') failed under job $alst_job" >> "$alst_run/slurm/excluded"
        done
        if [ "${SLURM_RESTART_COUNT:-0}" -gt "$alst_requeues" ]; then requeue "ended by Slurm" 1; fi
        for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
            if grep -qs "^$node " "$alst_run/slurm/excluded"; then requeue "node $node failed before" 1; fi
        done
    fi
    echo "$(date +%s) $alst_errors_before $SLURM_JOB_NODELIST" > "$began"
}

after_tasks() {
    local code="$1" mark="$alst_run/slurm/requeue-$SLURM_JOB_ID" reason=
    # Slurm ends it: a node failed, it was cancelled, its time is over. Requeued by us it would come back to life.
    if [ "$(squeue --noheader --jobs="$alst_job" --format=%T)" != RUNNING ]; then
        rm -f "$mark"
        exit "$code"
    fi
    rm -f "$alst_run/slurm/nodes-$SLURM_JOB_ID"
    if [ -e "$mark" ]; then
        reason="$(cat "$mark")"
        rm -f "$mark"
    elif [ "$code" != 0 ] && launch_failed; then
        reason="its tasks could not be launched"
    fi
    if [ -z "$reason" ]; then exit "$code"; fi
    # All tasks ended well, saved: the next job of the chain has waited long enough.
    if [ -n "$alst_next" ] && [ "$code" = 0 ]; then exit 0; fi
    # SIGTERM has other causes.
    if [ "$reason" = preempted ] && ! scontrol show job "$alst_job" | grep -q 'PreemptTime=[0-9]'; then exit "$code"; fi
    requeue "$reason" "$code"
}
