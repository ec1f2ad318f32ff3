#!/usr/bin/env bash
# A build step: search precisions for a model, pick a plan, compile it, test the artefact.
#
# Exit codes: 0 built; 1 the artefact is not good enough; 2 something has to change first.
# Environment variables change what stands here:
#   TARGET       the accelerator (bitwright targets lists them)
#   LIMIT        points of error more than the float model's, on validation data, for the plan
#   GATE         points of error more than the float model's, on test data, for the artefact
#   BUDGET       seconds that the search may take
#   GENERATIONS  generations after which it ends even if there is time left
#   OUT          the folder for all results
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lenet=$here/../lenet_digits

TARGET=${TARGET:-bitfusion/eyeriss}
LIMIT=${LIMIT:-0.5}
GATE=${GATE:-1}
BUDGET=${BUDGET:-60}
GENERATIONS=${GENERATIONS:-10}
OUT=${OUT:-out/pipeline}

number='[0-9]+([.][0-9]+)?'
if ! [[ $LIMIT =~ ^$number$ && $GATE =~ ^-?$number$ ]]; then
    echo "error: LIMIT=$LIMIT or GATE=$GATE is no number of points" >&2
    exit 2
fi

# The bitwright of the PATH, or that of `make demo`; Python stands beside it.
command -v bitwright > /dev/null || PATH=$here/../../.venv/bin:$PATH
if ! command -v bitwright > /dev/null; then
    echo "error: there is no bitwright: pip install it, or run make demo once" >&2
    exit 2
fi
python=$(dirname "$(readlink -f "$(command -v bitwright)")")/python3

# What an earlier build left. The study stays: the search goes on with it.
mkdir -p "$OUT"
rm -rf "$OUT/artefact" "$OUT/report.html"
study=$OUT/study-${TARGET//\//-}

# 1. Two halves of the labelled data: one for the search, one that only the artefact sees.
"$python" - "$lenet/test.npz" "$OUT" <<'EOPY'
import sys
import numpy as np

data = dict(np.load(sys.argv[1]))
for name, part in (("validation", slice(1000)), ("test", slice(1000, None))):
    np.savez(f"{sys.argv[2]}/{name}.npz", **{key: array[part] for key, array in data.items()})
EOPY

# 2. Search, or go on with a search that was stopped.
if [[ -e $study ]]; then
    bitwright search --resume "$study" \
        --generations "$GENERATIONS" --time-budget "$BUDGET" --quiet
else
    bitwright search "$lenet/lenet.onnx" --target "$TARGET" \
        --calibration "$lenet/calibration.npz" --validation "$OUT/validation.npz" \
        --objectives error,compression --constraint 'error<=+2pp' \
        --generations "$GENERATIONS" --time-budget "$BUDGET" --quiet --output "$study"
fi
bitwright report "$study" --output "$OUT/report.html" > "$OUT/build.log"

# 3. Pick: the smallest weights whose error stays within the limit.
plan=$(bitwright front "$study" --best "error<=+${LIMIT}pp" --by compression --quiet)
echo "plan: $plan"

# 4. Compile it, with the target and the calibration of the study.
bitwright compile "$lenet/lenet.onnx" --plan "$plan" --output "$OUT/candidate" --overwrite \
    >> "$OUT/build.log"

# 5. Run the artefact on the data that the search has not seen, and let it through or not.
bitwright run "$OUT/candidate" --data "$OUT/test.npz" --no-reference --json > "$OUT/test.json"
"$python" - "$OUT/test.json" "$GATE" <<'EOPY'
import json
import sys

with open(sys.argv[1]) as file:
    error = {form["form"]: 100 * (1 - form["value"]) for form in json.load(file)["forms"]}
more, gate = error["artifact"] - error["float"], float(sys.argv[2])
print(f"error on test data: float model {error['float']:.2f} %, artefact {error['artifact']:.2f} %")
if more > gate + 1e-9:
    sys.exit(f"error: the artefact has {more:.2f} points of error more; the gate is {gate:g}")
EOPY
mv "$OUT/candidate" "$OUT/artefact"
echo "artefact: $OUT/artefact"
echo "report: $OUT/report.html"
