#!/bin/sh
# Train every architecture with every norm and seed on CIFAR-10 (train3.sh: on CIFAR-100), as RescaleViT's sweep does.
#
#   sh train1.sh                               the whole sweep: 16 runs, and those from pretrained weights
#   ARCHS=ViT-B_32 NORMS="LN BN" SEEDS="1 2 3" sh train1.sh --num_steps 1000        flags go to train.py
#   GPUS="0 1 2 3" sh train1.sh                one run a GPU; GPUS="0 0": two at a time on GPU 0, or on the CPU
#   DRY_RUN=1 sh train1.sh                     only say what would run, and for how long
#   CELL=3 sh train1.sh                        only this cell, counted from 0, for job arrays
#
# LN also starts from checkpoint/imagenet21k_ARCH.npz where that exists (PRETRAINED=0: never). train.py itself skips
# finished runs and continues unfinished ones. More in docs/sweeps.md.
set -uf # words of ARCHS are no patterns of file names
CDPATH="" cd -- "$(dirname -- "$0")" || exit 2
PYTHON=${PYTHON:-$(command -v python3 || command -v python)} GPUS=${GPUS:-0} CELL=${CELL:-} DRY_RUN=${DRY_RUN:-0}
ARCHS=${ARCHS:-ViT-B_16 ViT-B_32 ViT-L_32 ViT-L_16} NORMS=${NORMS:-LN BN GN Rescale} SEEDS=${SEEDS:-42}

state=$(mktemp -d) && trap 'rm -rf "$state"' EXIT || exit 2 # cells, which are taken or failed, the status to stop with
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM # dash ends without cleaning up, otherwise
facts=$("$PYTHON" -c 'import shlex; from utils.options import train_parser # what the flags say, also those in @recipes
args = train_parser().parse_args()
print(f"DATASET={args.dataset} OUTPUT={shlex.quote(args.output_dir)}", "DRY_RUN=1" * args.dry_run)' \
    --dataset "${DATASET:-cifar10}" "$@") || exit 2
case $facts in DATASET=*) eval "$facts" ;; *) echo "$facts" && exit ;; esac # else it is --help's text
set -- --name="${NAME:-$DATASET-100_500}" --dataset "$DATASET" "$@"
for arch in $ARCHS; do
    for norm in $NORMS; do
        for seed in $SEEDS; do
            cell="--model_type $arch --norm_type $norm --seed $seed" weights=checkpoint/imagenet21k_$arch.npz
            [ "$arch" = ViT-L_16 ] && cell="--train_batch_size 64 $cell"
            [ "$norm" = LN ] && [ "${PRETRAINED:-1}" != 0 ] && [ -f "$weights" ] &&
                echo "@recipes/rescalevit_cifar10_pretrained.args --pretrained_dir $weights $cell"
            echo "@recipes/rescalevit_cifar10.args $cell"
        done
    done
done | case $CELL in "") cat ;; *[!0-9]*) ;; *) sed -n "$((CELL + 1))p" ;; esac >"$state/cells"
# A mistake in a flag would stop every run, so all are checked before the first.
"$PYTHON" train.py --dry_run --cells "$state/cells" --gpu_id "${GPUS%% *}" "$@" >"$state/plan" || exit 2
[ "$DRY_RUN" = 0 ] || { cat "$state/plan"; exit; }

await() { wait "$1"; status=$?; while kill -0 "$1" 2>/dev/null; do wait "$1"; status=$?; done; } # signals end `wait` early
worker() { # gpu, flags: train cells that nobody has taken, until there are none or the sweep is to stop
    gpu=$1 child='' number=0; shift
    trap '[ -z "$child" ] || kill "$child" 2>/dev/null' TERM
    while read -r cell && [ ! -e "$state/stop" ]; do
        number=$((number + 1))
        mkdir "$state/$number" 2>/dev/null || continue # one worker alone can make it
        "$PYTHON" train.py $cell "$@" --gpu_id "$gpu" </dev/null >&3 &
        child=$! && await "$child"
        case $status in 0) ;; 129 | 130 | 138 | 143) [ -e "$state/stop" ] || echo "$status" >"$state/stop" ;;
            *) echo "  $cell: status $status" >>"$state/failed" ;;
        esac
    done <"$state/cells"
}
exec 3>&1 && case $GPUS in *" "*) exec 3>/dev/null ;; esac # what several say at a time is in output/*.txt
for gpu in $GPUS; do worker "$gpu" "$@" & workers="${workers:-} $!"; done
stop() { echo "$1" >"$state/stop"; kill $workers 2>/dev/null; } # status; every run saves and ends
trap 'stop 129' HUP; trap 'stop 130' INT; trap 'stop 138' USR1; trap 'stop 143' TERM
for each in $workers; do await "$each"; done
[ ! -e "$state/stop" ] || {
    echo "sweep stopped; the same command, without --overwrite, goes on from here" >&2
    exit "$(cat "$state/stop")"
}
[ -n "$CELL" ] || "$PYTHON" plot.py "$OUTPUT" || echo "  plot.py $OUTPUT: status $?" >>"$state/failed"
[ ! -e "$state/failed" ] || { echo "failed:" >&2; cat "$state/failed" >&2; exit 1; }
