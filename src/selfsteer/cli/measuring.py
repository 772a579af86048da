"""The commands that measure: preference data, models, reward models."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from selfsteer.cli.arguments import (
    ChatTemplate,
    EngineFile,
    Json,
    JudgeName,
    ModelName,
    Output,
    PairsFile,
    TemplateArguments,
    examples,
    print_dropped,
    read_template_arguments,
    tell,
)
from selfsteer.recipe.engines import DTypeName
from selfsteer.runtime import graceful_stop

app = typer.Typer()


@app.command(epilog=examples("measure runs/quickstart", "measure pairs.jsonl --policy owner/model --judge owner/judge"))
def measure(
    pairs: PairsFile,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model to measure under, as policy.model in a recipe; of a run folder, the one that its pairs are for.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Who judges the pairs: an LLM, a reward model, implicit:MODEL (a model trained from the policy), or a .yaml"
            " file with a judge section.",
            show_default=False,
        ),
    ] = None,
    template_arguments: TemplateArguments = None,
    json: Json = None,
) -> None:
    """Measure a preference dataset: on-policy probability, margins, lengths, overlap, and a judge's accuracy."""
    from selfsteer.data.named import check_pairs

    check_pairs([pairs], {"--policy": policy, "--judge": judge})
    with graceful_stop():
        from selfsteer.given import measure_pairs
        from selfsteer.reports.tables import print_measures

        found = measure_pairs(pairs, policy, judge, read_template_arguments(template_arguments))
        tell(found, json, lambda: print_measures(found))
        print_dropped(found.get("dropped", {}), found.get("pairs", 0))


@app.command(epilog=examples("evaluate aligned-model --before owner/model --tasks ifeval,gsm8k --limit 50"))
def evaluate(
    model: ModelName,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="ifeval, gsm8k, math500, mmlu, or any task of lm-evaluation-harness; alpaca_eval, mt_bench, arena_hard with"
            " --judge.",
        ),
    ] = "",
    before: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model to compare with, on the same items.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task; labelled as such.", min=1)] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with a folder of files for each task; the hub's otherwise.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each item, instead of the task's own.", min=0)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of an answer, instead of the task's own.", min=1)] = None,
    engine: EngineFile = None,
    judge: JudgeName = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Recorded judgements in AlpacaEval's format, in place of a judge; MODEL is a name."
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    template_arguments: TemplateArguments = None,
    output: Output = Path("evaluations"),
    json: Json = None,
) -> None:
    """Measure a model on benchmarks, alone or against the one before; exit before anything runs if something is missing."""
    from selfsteer.data.named import check_pairs

    if annotations is None:
        check_pairs([], {"MODEL": model, "--before": before, "--judge": judge})
    with graceful_stop():
        from selfsteer import evaluating
        from selfsteer.recipe.sections import EvaluationSection, Policy
        from selfsteer.reports.tables import print_annotated, print_evaluation

        if annotations is not None:
            if tasks or before or judge or limit or engine:
                raise ValueError(
                    "--annotations: recorded judgements need no --tasks, --before, --judge, --limit or --engine"
                )
            rate, who = evaluating.annotated(annotations, data)
            tell({"who": who, **asdict(rate)}, json, lambda: print_annotated(rate, who))
            return
        section = EvaluationSection(
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            data=None if data is None else str(data),
            fewshot=fewshot,
            max_new_tokens=max_new_tokens,
        )
        arguments = read_template_arguments(template_arguments)
        policies = [
            Policy(model=name, chat_template=chat_template, template_arguments=arguments)
            for name in (before, model)
            if name is not None
        ]
        found = evaluating.evaluate_models(policies, section, evaluating.read_engine(engine), judge, output)
        title = f"Evaluation of {model}" + (f" against {before}" if before else "")
        tell(found, json, lambda: print_evaluation(found, title))


@app.command(
    "compare-answers",
    epilog=examples("compare-answers aligned-model owner/model --queries queries.jsonl --judge judge.yaml"),
)
def compare_answers(
    a: Annotated[str, typer.Argument(metavar="A", help="The model whose win rate is asked for.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that it is compared with.")],
    queries: Annotated[Path, typer.Option(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file of queries.")],
    judge: Annotated[
        str, typer.Option(metavar="JUDGE", help="An LLM, a reward model, or a .yaml file with a judge section.")
    ],
    column: Annotated[str, typer.Option(help="The column with the query.")] = "query",
    limit: Annotated[int | None, typer.Option(help="Only so many queries, the first ones.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 takes the most probable token.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus of the answers.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of an answer.", min=1)] = 2048,
    template_arguments: TemplateArguments = None,
    engine: EngineFile = None,
    output: Output = Path("evaluations"),
    json: Json = None,
) -> None:
    """Let a judge compare two models' answers to the same queries, in both orders; length-controlled, too."""
    from selfsteer.data.files import check_source
    from selfsteer.data.named import check_pairs

    check_pairs([], {"A": a, "B": b, "--judge": judge})
    check_source(queries, "--queries")
    with graceful_stop():
        from selfsteer import evaluating
        from selfsteer.recipe.sections import Policy, Queries, Sampled
        from selfsteer.reports.tables import print_evaluation

        arguments = read_template_arguments(template_arguments)
        found = evaluating.compare_answers(
            (Policy(model=a, template_arguments=arguments), Policy(model=b, template_arguments=arguments)),
            Queries(path=str(queries), column=column, limit=limit),
            Sampled(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
            (evaluating.read_engine(engine), judge),
            output,
        )
        tell(found, json, lambda: print_evaluation(found, f"{a} against {b}"))


@app.command(epilog=examples("reward pairs.jsonl --model owner/model --output reward-model"))
def reward(
    pairs: Annotated[list[Path], typer.Argument(metavar="PAIRS...", help="Preference datasets.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The chat model to start from, as policy.model in a recipe.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; the same command goes on from there.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,...", help="How often each dataset is taken: 0.5 half of it, 2 twice.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of the queries kept for measuring.", min=0, max=0.9)] = 0.1,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="1e-5 when left out; 1e-4 with --lora-rank.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs an optimizer step.", min=1)] = 32,
    micro_batch_size: Annotated[int, typer.Option(help="Pairs a forward pass: memory, not mathematics.", min=1)] = 4,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank; all weights otherwise.", min=1)] = None,
    margin: Annotated[bool, typer.Option("--margin", help="Take each pair's own margin from its row.")] = False,
    center: Annotated[float | None, typer.Option(help="Pull rewards to a mean of zero, such as 0.01.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longer conversations are dropped.", min=1)] = 2048,
    chat_template: ChatTemplate = None,
    dtype: Annotated[DTypeName, typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the head and of the order.", min=0)] = 0,
) -> None:
    """Train a reward model on preference pairs, and measure it on held-out ones."""
    from selfsteer.data.named import check_pairs

    check_pairs(pairs, {"--model": model})
    with graceful_stop():
        from selfsteer import rewards
        from selfsteer.reports.tables import print_judged
        from selfsteer.training.reward import RewardTraining

        given = [1.0] * len(pairs) if weights is None else [_weight(text) for text in weights.split(",")]
        if len(given) != len(pairs):
            raise ValueError(f"--weights: {len(given)} weights for {len(pairs)} datasets")
        training = RewardTraining(
            epochs=epochs,
            learning_rate=(1e-5 if lora_rank is None else 1e-4) if learning_rate is None else learning_rate,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            lora_rank=lora_rank,
            margin=margin,
            center=center,
            dtype=dtype,
            seed=seed,
            save_steps=save_steps,
        )
        settings = rewards.RewardSettings(holdout=holdout, max_tokens=max_tokens, chat_template=chat_template, dtype=dtype)
        sources = [rewards.Source(path=path, weight=weight) for path, weight in zip(pairs, given, strict=True)]
        found = rewards.train_reward_model(sources, model, output, settings, training)
        if found["held_out"]:
            print_judged(found["held_out"], "Held-out pairs")
        typer.echo(f"reward model  {found['model']}")


@app.command("reward-bench", epilog=examples("reward-bench reward-model --data rewardbench.parquet"))
def reward_bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A reward model: a folder or a hub id.", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="RewardBench, RewardBench 2, LLMBar, or preference pairs; several times for several."
        ),
    ],
    output: Output = Path("evaluations"),
    max_tokens: Annotated[int, typer.Option(help="Longer conversations are not scored.", min=1)] = 8192,
    dtype: Annotated[DTypeName, typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    json: Json = None,
) -> None:
    """Measure a reward model on labelled data: by subset and over all, as each benchmark is published."""
    from selfsteer.data.files import check_source
    from selfsteer.data.named import check_pairs

    check_pairs([], {"DIR": model})
    for file in data:
        check_source(file, "--data")
    with graceful_stop():
        from selfsteer import rewards
        from selfsteer.reports.tables import print_reward_bench

        settings = rewards.RewardSettings(max_tokens=max_tokens, dtype=dtype)
        found = rewards.reward_bench(model, data, output, settings)

        def show() -> None:
            for name, benchmark in found.items():
                print_reward_bench(benchmark, name)

        tell(found, json, show)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"--weights: {text!r} is no positive number")
    return weight
