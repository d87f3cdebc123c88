"""Rows: one for each probe's outcome, in Parquet. Every table, interval and figure is a query over rows."""

import pyarrow as pa

TAGS = pa.map_(pa.string(), pa.string())

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),  # a label of the run; "unedited" for the model as it is
        ("setting", pa.string()),  # single, all, sequential
        ("edits", pa.int32()),  # edits in the model when the probe was asked; 0 for the unedited one
        ("case", pa.string()),  # empty for probes of the whole run: collateral, unrelated text
        ("edit", pa.string()),  # EditRequest.id
        ("probe", pa.int32()),  # index of the probe in its case
        ("kind", pa.string()),
        ("test", pa.string()),
        ("joined", pa.string()),
        ("condition", pa.bool_()),
        ("tags", TAGS),  # the case's and the probe's
        ("prompt", pa.string()),
        ("expected", pa.list_(pa.string())),
        ("alternatives", pa.list_(pa.string())),
        ("generated", pa.string()),  # greedy continuation; for kind "generation" the sampled text, prompt included
        ("first_token", pa.string()),  # text of the likeliest next token
        ("unedited", pa.string()),  # the unedited model's greedy continuation
        # Geometric mean over tokens, teacher-forced, of the canonical expected and of the first alternative; null without.
        ("p_expected", pa.float64()),
        ("p_alternative", pa.float64()),
        ("p_expected_first", pa.float64()),  # probability of the first token of each
        ("p_alternative_first", pa.float64()),
        ("token_accuracy", pa.float64()),  # share of expected's tokens that are the likeliest, teacher-forced
        (
            "gate",
            pa.string(),
        ),  # id of the edit whose gate was open at the prompt's end, empty for none, null without gates
        ("distance", pa.float64()),  # to the nearest edit's centre, in its gate's unit; null without gates
        ("own_distance", pa.float64()),  # to the centre of the case's own edit
        ("passed", pa.bool_()),  # by our default protocol: the whole object, or the unedited answer kept
    ]
)
FITS = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("case", pa.string()),
        ("edit", pa.string()),
        ("seconds", pa.float64()),  # of the fit, a batch's shared evenly over its edits
        ("nbytes", pa.int64()),  # of the patch's tensors for this edit
        ("error", pa.string()),  # why the fit failed; empty if it did not
        ("report", pa.string()),  # JSON: the patch's entry about the edit
    ]
)
