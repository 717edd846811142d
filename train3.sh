#!/bin/sh
# The sweep of train1.sh on CIFAR-100; see there.
DATASET=${DATASET:-cifar100} exec sh "$(dirname -- "$0")/train1.sh" "$@"
