"""Published numbers, as printed, in the papers' units: by preset, model, method and metric (the paper's letters).

They are of the papers' models and data. Tables show them in columns of their own, never beside ours in one.
"""

from collections.abc import Mapping
from types import MappingProxyType

Numbers = Mapping[str, Mapping[str, float]]  # method -> metric -> value


def _table(columns: str, text: str) -> Numbers:
    """Rows `method | values`; a dash is a value that was not reported."""
    names, found = columns.split(), {}
    for line in text.strip().splitlines():
        method, values = line.split("|")
        pairs = zip(names, values.split(), strict=True)
        found[method.strip()] = MappingProxyType({name: float(v) for name, v in pairs if v != "-"})
    return MappingProxyType(found)


_RIPPLE, _COUNTERFACT, _ROME = "CI CII SA RS", "Acc Gen Spec", "S ES EM PS PM NS NM GE RS"
_ZSRE, _FEVER = "TRR ERR avg edits", "success retain equivalence"

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "sake-ripple": "Scialanga et al. 2025, RippleEdits Popular (885 edits), one edit at a time except MEMIT (all at once)",
        "sake-doubt": "Scialanga et al. 2025, first 150 CounterFact edits",
        "sake-counterfact": "Scialanga et al. 2025, first 2,000 CounterFact edits",
        "rome-counterfact": "Meng et al. 2022, CounterFact",
        "rome-trace": "Meng et al. 2022, 1,000 known facts",
        "grace-zsre": "Hartvigsen et al. 2023, T5 on zsRE, F1",
        "grace-scotus": "Hartvigsen et al. 2023, BERT on SCOTUS, accuracy",
        "ke-fever": "De Cao et al. 2021, BERT-base on FEVER",
    }
)

PUBLISHED: Mapping[str, Mapping[str, Numbers]] = MappingProxyType(
    {
        "sake-ripple": {
            "GPT2-XL": _table(
                _RIPPLE,
                """
                ROME | 38.62 16.67 51.96 39.43
                MEMIT | 2.47 1.95 7.17 3.75
                CompMEMIT | 20.69 0.00 10.10 14.71
                ActAdd | 26.63 29.17 42.12 50.68
                Uniform steering | 47.85 32.14 52.74 -
                SAKE | 50.00 33.33 54.59 58.39
                """,
            ),
            "Llama-2-7b": _table(
                _RIPPLE,
                """
                ROME | 27.51 8.28 47.72 29.90
                MEMIT | 5.80 9.28 42.43 24.52
                CompMEMIT | 17.21 7.89 8.45 48.83
                ActAdd | 9.57 18.12 47.69 59.40
                Uniform steering | 20.79 20.62 50.23 -
                SAKE | 44.32 27.63 53.34 56.93
                """,
            ),
        },
        "sake-doubt": {
            "GPT2-XL": _table(
                "DI DII",
                """
                ROME | 33.33 14.00
                ActAdd | 82.00 80.67
                ICL | 4.00 3.33
                SAKE | 98.67 98.67
                """,
            ),
            "Llama-2-7b": _table(
                "DI DII",
                """
                ROME | 1.33 23.33
                ActAdd | 82.67 98.00
                ICL | 0.00 4.00
                SAKE | 92.00 98.67
                """,
            ),
        },
        "sake-counterfact": {
            "GPT2-XL": _table(
                _COUNTERFACT,
                """
                ROME | 99.55 73.70 82.67
                MEMIT | 60.00 36.60 67.21
                ActAdd | 85.00 29.78 82.75
                Uniform steering | 85.05 35.45 -
                SAKE | 97.00 84.85 84.52
                """,
            ),
            "Llama-2-7b": _table(
                _COUNTERFACT,
                """
                ROME | 99.95 68.20 93.48
                MEMIT | 74.40 55.13 74.37
                ActAdd | 90.10 33.65 81.45
                Uniform steering | 91.05 40.73 -
                SAKE | 97.70 82.03 85.59
                """,
            ),
        },
        "rome-counterfact": {
            "GPT2-XL": _table(
                _ROME,
                """
                unedited | 30.5 22.2 -4.8 24.7 -5.0 78.1 5.0 626.6 31.9
                FT | 65.1 100.0 98.8 87.9 46.6 40.4 -6.2 607.1 40.5
                FT+L | 66.9 99.1 91.5 48.7 28.9 70.3 3.5 621.4 37.4
                KN | 35.6 28.7 -3.4 28.0 -3.3 72.9 3.7 570.4 30.3
                KE | 52.2 84.3 33.9 75.4 14.6 30.9 -11.0 586.6 31.2
                KE-CF | 18.1 99.9 97.0 95.8 59.2 6.9 -63.2 383.0 24.5
                MEND | 57.9 99.1 70.9 65.4 12.2 37.9 -11.6 624.2 34.8
                MEND-CF | 14.9 100.0 99.2 97.0 65.6 5.5 -69.9 570.0 33.2
                ROME | 89.2 100.0 97.9 96.4 62.7 75.4 4.2 621.9 41.9
                """,
            ),
            "GPT-J": _table(
                _ROME,
                """
                unedited | 23.6 16.3 -7.2 18.6 -7.4 83.0 7.3 621.8 29.8
                FT | 25.5 100.0 99.9 96.6 71.0 10.3 -50.7 387.8 24.6
                FT+L | 68.7 99.6 95.0 47.9 30.4 78.6 6.8 622.8 35.5
                MEND | 63.2 97.4 71.5 53.6 11.0 53.9 -6.0 620.5 32.6
                ROME | 91.5 99.9 99.4 99.1 74.1 78.9 5.2 620.1 43.0
                """,
            ),
        },
        "rome-trace": {
            "GPT2-XL": _table(
                "AIE",
                """
                hidden state, peak | 8.7
                MLP, peak | 6.6
                attention, last subject token | 1.6
                """,
            ),
        },
        "grace-zsre": {
            "T5": _table(
                _ZSRE,
                """
                FT | .56 .82 .69 1000
                FT+EWC | .51 .82 .66 1000
                FT+Retrain | .27 .99 .63 1000
                MEND | .25 .27 .26 1000
                Defer | .72 .31 .52 1000
                Memory | .25 .27 .26 1000
                GRACE | .69 .96 .82 1000
                """,
            ),
        },
        "grace-scotus": {
            "BERT": _table(
                _ZSRE,
                """
                FT | .52 .52 .52 415
                FT+EWC | .67 .50 .58 408
                FT+Retrain | .67 .83 .75 403
                MEND | .19 .27 .23 672
                Defer | .33 .41 .37 506
                Memory | .21 .20 .21 780
                GRACE | .81 .82 .82 381
                """,
            ),
        },
        "ke-fever": {
            "BERT-base": _table(
                _FEVER,
                """
                FT (1st layer) | 100.0 99.44 42.24
                FT (all layers) | 100.0 86.95 95.58
                Zhu et al. (1st layer) | 100.0 99.44 40.30
                Zhu et al. (all layers) | 100.0 94.07 83.30
                KE, C_L2 | 99.10 45.10 99.01
                KE | 98.80 98.14 82.69
                KE + loop | 100.0 97.78 81.57
                KE + P^x | 98.50 98.55 95.25
                KE + P^x + loop | 100.0 98.46 94.65
                """,
            ),
        },
    }
)

_EASYEDIT = "Published ROME and MEMIT ran with EasyEdit's default parameters (ROME without its covariance)."
# What the text of a paper says without a table, or says beyond its table.
REMARKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sake-ripple": (
            _EASYEDIT,
            "The paper's text overclaims in places: on Llama-2-7b ActAdd's relation specificity is above SAKE's, and CompMEMIT's "
            "above ROME's.",
        ),
        "sake-counterfact": (_EASYEDIT,),
        "sake-doubt": (_EASYEDIT,),
        "sake-threshold": (
            "Thresholds of the paper: 6.75 on CounterFact; on Popular 5.5 (GPT2-XL) and 5.3 (Llama-2-7b).",
        ),
        "sake-prompts": ("The paper's values are not legible in our copy; its text says that 50 paraphrases suffice.",),
        "steam-counterfact": (
            "The paper reports that portability and consistency rise (portability by up to 2.2 points in batch editing) while "
            "efficacy, paraphrase and neighbourhood stay about equal; GPT2-XL, GPT-J, Qwen2, Llama-3.",
        ),
        "steam-sweep": ("The paper finds that too strong an alignment hurts generation.",),
    }
)

# Editors of this library and the names that the papers' tables have for them.
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "unedited": "unedited", "sake": "SAKE", "uniform": "Uniform steering", "actadd": "ActAdd", "rome": "ROME",
        "memit": "MEMIT", "compmemit": "CompMEMIT", "icl": "ICL", "ft": "FT", "grace": "GRACE", "mend": "MEND",
        "ke": "KE", "kn": "KN", "ft-l": "FT+L", "ke-cf": "KE-CF", "mend-cf": "MEND-CF",
    }
)  # fmt: skip
