#!/usr/bin/env bash
# One training on several hosts without a scheduler.  The same command on each of them, in any order, from the clone:
#
#   launch/multinode.sh FIRST_HOST[:PORT] HOSTS RANKS_PER_HOST [the trainer's options]
#   launch/multinode.sh node1 2 8 --config configs/celeba64.yaml --data.dataroot PATH --run.dir /shared/runs/a
#
#   FIRST_HOST      Name or IPv4 address, as all hosts know it, of the host where they meet; port 29400.
#   HOSTS           Their number; or MIN:MAX: begins with any number between, goes on when hosts are lost or come back.
#   RANKS_PER_HOST  GPUs of each host; on CPUs 1.
#
# It ends with launch/run.py's exit code; 75: saved, the same command on each host goes on.  See docs/cluster.md.
#
# Environment:
#   PYTHON      The interpreter; default .venv/bin/python in the clone.
#   RUN_ID      Hosts that give the same one belong together; default dcgan.
#   RESTARTS    How often failed ranks are started anew; default 0, with MIN:MAX 10: each lost host takes one.
#   LOCAL_ADDR  This host's address, where its own name means nothing to the others, or the wrong network; FIRST_HOST
#               is then the first host's address.  Also set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its interface.
#   PET_...     Any other option of torchrun, such as PET_RDZV_CONF=last_call_timeout=60.

set -u

fail() {
    echo "multinode.sh: error: $1" >&2
    exit 2
}

(($# >= 3)) || fail "give FIRST_HOST[:PORT] HOSTS RANKS_PER_HOST and the trainer's options, got $# word(s)"
endpoint=$1 hosts=$2 ranks=$3
shift 3
[[ $endpoint =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?$ ]] || fail "FIRST_HOST must be HOST or HOST:PORT, got '$endpoint'"
[[ $endpoint == *:* ]] || endpoint=$endpoint:29400
[[ $hosts =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "HOSTS must be a number or MIN:MAX, got '$hosts'"
((${hosts%:*} <= ${hosts#*:})) || fail "HOSTS must not end below its beginning, got '$hosts'"
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_HOST must be a number of at least 1, got '$ranks'"

clone=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$clone/.venv/bin/python}
command -v "$python" > /dev/null || fail "PYTHON must be an interpreter, got $python (make train and make test make .venv)"

restarts=0
if [[ $hosts == *:* ]]; then
    restarts=10
    # Otherwise the first host tells its store's address once only, and a host that comes later waits 60 s for it and
    # takes all down with it (torch 2.15).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
torchrun=(
    --nnodes="$hosts"
    --nproc_per_node="$ranks"
    --max_restarts="${RESTARTS:-$restarts}"
    --rdzv_backend=c10d
    --rdzv_id="${RUN_ID:-dcgan}"
    --rdzv_endpoint="$endpoint"
)
if [[ -n ${LOCAL_ADDR:-} ]]; then
    is_host=0
    [[ $LOCAL_ADDR != "${endpoint%:*}" ]] || is_host=1
    torchrun+=(--local_addr="$LOCAL_ADDR" --rdzv_conf="is_host=$is_host${PET_RDZV_CONF:+,$PET_RDZV_CONF}")
fi
exec "$python" "$clone/launch/run.py" "${torchrun[@]}" "$clone/launch/train.py" "$@"
