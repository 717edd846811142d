#!/bin/sh
# Train every architecture with every norm and seed on CIFAR-10 (train3.sh: on CIFAR-100), as RescaleViT's sweep does.
#
#   sh train1.sh                                                  the whole sweep: 16 runs, and pretrained ones
#   ARCHS=ViT-B_32 NORMS="LN BN" SEEDS="1 2 3" sh train1.sh --num_steps 1000
#   GPUS="0 1 2 3" sh train1.sh                                   one run a GPU; GPUS="0 0": two at a time on GPU 0 or CPU
#   DRY_RUN=1 sh train1.sh                                        only say what would run, and for how long
#
# Flags go to train.py, behind those of recipes/rescalevit_cifar10.args; paths are seen from this folder. LN also starts
# from checkpoint/imagenet21k_ARCH.npz where that exists (PRETRAINED=0: never). Finished runs are skipped, unfinished
# ones go on, failed ones are named at the end (status 1). Ctrl-C and SIGTERM save and stop (status 130, 143).
# CELL=N runs only the Nth cell, counted from 0, for job arrays.
set -uf # words of ARCHS are no patterns of file names
CDPATH="" cd -- "$(dirname -- "$0")" || exit 2
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
DATASET=${DATASET:-cifar10} NAME=${NAME:-${DATASET:-cifar10}-100_500}
ARCHS=${ARCHS:-ViT-B_16 ViT-B_32 ViT-L_32 ViT-L_16} NORMS=${NORMS:-LN BN GN Rescale} SEEDS=${SEEDS:-42}
GPUS=${GPUS:-0} CELL=${CELL:-} DRY_RUN=${DRY_RUN:-0} PRETRAINED=${PRETRAINED:-1}

mistake() {
    printf 'train1.sh: error: %s\n' "$(printf %s "$1" | tr '\n' ' ')" >&2
    exit 2
}
command -v "$PYTHON" >/dev/null || mistake "PYTHON '$PYTHON': no such program"
case $CELL in *[!0-9]* | 0?* | ?????????*) mistake "CELL '$CELL' is not the number of a cell" ;; esac
case $GPUS in *[!0-9\ ]* | " "*) mistake "GPUS '$GPUS' are not numbers with spaces between" ;; esac

state=$(mktemp -d) || exit 2 # cells; who has which (folders); failed ones; the wish to stop
trap 'rm -rf "$state"' EXIT

for arch in $ARCHS; do
    weights=checkpoint/imagenet21k_$arch.npz
    for norm in $NORMS; do
        for seed in $SEEDS; do
            [ "$norm" = LN ] && [ "$PRETRAINED" != 0 ] && [ -f "$weights" ] && printf '%s\n' "$arch $norm $seed $weights"
            printf '%s\n' "$arch $norm $seed -"
        done
    done
done >"$state/all"
if [ -n "$CELL" ]; then
    sed -n "$((CELL + 1))p" "$state/all" >"$state/cells"
    [ -s "$state/cells" ] || mistake "no cell $CELL, there are $(wc -l <"$state/all") from 0 on"
else
    mv "$state/all" "$state/cells"
fi
[ -s "$state/cells" ] || mistake "nothing to do: ARCHS, NORMS or SEEDS is blank"

output=output before=
for word; do # where the user's flags put the results
    [ "$before" = --output_dir ] && output=$word
    case $word in --output_dir=*) output=${word#*=} ;; esac
    before=$word
done

cell() { # arch norm seed weights gpu, then the user's flags: train, or with DRY_RUN print what would be done
    arch=$1 norm=$2 seed=$3 weights=$4 gpu=$5 recipe=@recipes/rescalevit_cifar10.args
    shift 5
    [ "$arch" = ViT-L_16 ] && set -- --train_batch_size 64 "$@"
    [ "$weights" = - ] || { recipe=@recipes/rescalevit_cifar10_pretrained.args; set -- --pretrained_dir "$weights" "$@"; }
    set -- "$recipe" --name "$NAME" --dataset "$DATASET" --model_type "$arch" --norm_type "$norm" --seed "$seed" "$@"
    [ "$DRY_RUN" = 0 ] && exec "$PYTHON" train.py --gpu_id "$gpu" "$@"
    printf '%s\n' "$PYTHON train.py $*"
    "$PYTHON" plot.py --plan "$@"
}

while read -r arch norm seed weights; do # a mistake in a flag would stop each of them
    problem=$( (DRY_RUN=1; cell "$arch" "$norm" "$seed" "$weights" 0 "$@") 2>&1 >/dev/null) ||
        mistake "$arch $norm seed $seed: ${problem#*error: }"
done <"$state/cells"

if [ "$DRY_RUN" != 0 ]; then
    while read -r arch norm seed weights; do
        cell "$arch" "$norm" "$seed" "$weights" 0 "$@" || : >"$state/failed"
    done <"$state/cells" | awk '
        { print } /^  .*; about/ { sub(/.*; about /, ""); minutes += $1 } /^  .*; time unknown/ { unknown++ }
        END { printf "in all about %.0f min, one after another%s\n", minutes, unknown ? "; without " unknown " of unknown time" : "" }'
    [ ! -e "$state/failed" ]
    exit
fi

worker() { # gpu, then the user's flags: take cells that nobody has, until there are none or the sweep is to stop
    gpu=$1 child='' i=0
    shift
    trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
    while read -r arch norm seed weights; do
        i=$((i + 1))
        kill -0 $$ 2>/dev/null && [ ! -e "$state/stop" ] || return # $$ is the sweep: nobody goes on without it
        mkdir "$state/$i" 2>/dev/null || continue                  # made by one worker only
        label="$arch $norm seed $seed"
        [ "$weights" = - ] || label="$label from $weights"
        case $GPUS in # the output of several at a time would mix; it is in output/*.txt as well
            *\ *) cell "$arch" "$norm" "$seed" "$weights" "$gpu" "$@" </dev/null >"$state/$i/out" 2>&1 & ;;
            *) cell "$arch" "$norm" "$seed" "$weights" "$gpu" "$@" </dev/null & ;;
        esac
        child=$!
        [ ! -e "$state/stop" ] || kill -TERM "$child" # the wish came before there was a child
        wait "$child"
        status=$?
        while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the run has ended
            wait "$child"
            status=$?
        done
        if [ -e "$state/$i/out" ]; then
            line=$(grep -i 'best accuracy' "$state/$i/out" | tail -n 1)
            echo "$label: ${line:-$(tail -n 1 "$state/$i/out")}"
        fi
        case $status in
            0) ;;
            129 | 130 | 138 | 143) [ -e "$state/stop" ] || echo $status >"$state/stop" ;; # the run alone was told to stop
            *) echo "  $label: status $status" >>"$state/failed" ;;
        esac
    done <"$state/cells"
}

workers=
stop() { # status
    [ -e "$state/stop" ] || echo "$1" >"$state/stop"
    for each in $workers; do kill -TERM "$each" 2>/dev/null; done # not `pid`, which the loop that this interrupts uses
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 138' USR1
for gpu in $GPUS; do
    worker "$gpu" "$@" &
    workers="$workers $!"
done
for pid in $workers; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
done

if [ -e "$state/stop" ]; then
    echo "sweep stopped; the same command goes on from here" >&2
    exit "$(cat "$state/stop")"
fi
[ -n "$CELL" ] || "$PYTHON" plot.py "$output"
if [ -e "$state/failed" ]; then
    echo "failed:" >&2
    cat "$state/failed" >&2
    exit 1
fi
