"""Recipes: every shipped one loads; mistakes are found, named and put into words; what is written loads back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsteer.recipe import shipped
from selfsteer.recipe.engines import sampling_identity
from selfsteer.recipe.sections import Lora, Recipe, Sampled, describe, dump, load
from selfsteer.recipe.text import RecipeError, kinds_of

RECIPES = [shipped.recipe_file(name) for name in shipped.names()]
SMALLEST = {"policy": {"model": "some/model"}, "queries": {"path": "queries.jsonl"}}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return written(tmp_path, "policy:\n  model: some/model\nqueries:\n  path: queries.jsonl\n")


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, the folder of the recipe left out."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


# ---- what is shipped ------------------------------------------------------------------------------------------------


def test_a_folder_of_the_name_of_a_recipe_is_not_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`selfsteer run quickstart output=quickstart`, and the same once more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert shipped.recipe_file("quickstart").is_file()


def test_recipes_are_shipped():
    assert [path.stem for path in RECIPES] == [
        "authors-qwen2-7b",
        "comparison-cpu",
        "comparison-gpu",
        "comparison-style",
        "house-style",
        "llama3-8b",
        "quickstart",
        "qwen2-7b",
        "small-model",
        "steering",
        "ultrafeedback-cpu",
    ]


def test_a_bare_name_is_a_recipe_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Anywhere; a file of that name goes before it, and what there is not is answered with what there is."""
    monkeypatch.chdir(tmp_path)
    recipe = load("quickstart")
    assert recipe.queries.path == "shipped:questions.jsonl"
    assert Path(shipped.located(recipe.queries.path)).is_file()
    assert recipe.output == "runs/quickstart", "below the current folder"
    with pytest.raises(FileNotFoundError, match=r"quikstart: no such recipe file. With the package come quickstart, "):
        load("quikstart")
    (tmp_path / "quickstart").write_text("policy:\n  model: mine\nqueries:\n  path: queries.jsonl\n")
    assert load("quickstart").policy.model == "mine"


def test_every_file_that_a_recipe_names_comes_along():
    named = [path for recipe in map(load, RECIPES) for path in (recipe.queries.path, recipe.principles.path) if path]
    found = [shipped.located(path) for path in named if path.startswith(shipped.SHIPPED)]
    assert len(found) >= 4
    assert all(Path(path).is_file() for path in found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_described(path: Path, tmp_path: Path):
    recipe = load(path)
    assert Path(recipe.output).name == path.stem
    assert load(written(tmp_path, describe(recipe))) == recipe
    assert load(written(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2-7b"])
def test_the_papers_numbers(name: str):
    """arXiv 2410.17131v2: 60k queries, 8k for the generator, batches 32 and 256, rate 5e-7, beta and gamma 0.1."""
    recipe = load(next(path for path in RECIPES if path.stem == name))
    generator, alignment, responses = recipe.generator, recipe.alignment, recipe.responses
    assert (recipe.queries.limit, generator.queries) == (60_000, 8_000)
    assert (generator.loss, generator.beta, generator.sft_weight) == ("dpo", 0.1, 0.1)
    assert (generator.learning_rate, generator.batch_size, alignment.batch_size) == (5e-7, 32, 256)
    assert (alignment.loss, alignment.beta, alignment.learning_rate) == ("dpo", 0.1, 5e-7)
    assert (responses.temperature, responses.top_p, responses.max_new_tokens) == (0.7, 0.8, 2048)
    assert responses.bare == responses.steered, "y_o is drawn as the others"
    assert (generator.kind, generator.objective) == ("single", "sso")


def test_what_the_authors_code_does():
    """Only what it says otherwise than the paper differs from the paper's recipe (AutoAlign, algorithms/sso)."""
    authors, paper = (load(path) for path in RECIPES if path.stem in ("authors-qwen2-7b", "qwen2-7b"))
    expected = paper.model_dump()
    expected["output"] = "runs/authors-qwen2-7b"
    expected["principles"] |= {"model": None, "wrap": True, "concision": 0.0}
    expected["responses"]["original"]["temperature"] = 0.0
    expected["generator"]["queries"] = None
    expected["training"] |= {"weight_decay": 0.1, "warmup_ratio": 0.04}
    assert authors.model_dump() == expected


def test_every_field_is_described():
    """Each description is long enough to be one; sections are described by their docstring."""

    def check(section: type) -> None:
        for name, field in section.model_fields.items():
            inner = list(kinds_of(field).values())
            text = field.description or (inner[0].__doc__ if inner else "") or ""
            assert len(text.split()) >= 3, f"{section.__name__}.{name}"
            for kind in inner:
                check(kind)

    check(Recipe)


# ---- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_replace_values_of_the_file(smallest: Path):
    recipe = load(
        smallest,
        ["output=out/a-1", "generator.beta=0.5", "queries.limit=12", "filters.refusals=false", "training.report_to=[wandb]"],
    )
    assert recipe.output == "out/a-1"
    assert recipe.generator.beta == 0.5
    assert recipe.queries.limit == 12
    assert recipe.filters.refusals is False
    assert recipe.training.report_to == ["wandb"]
    assert recipe.policy.model == "some/model"


def test_the_last_of_two_overrides_wins(smallest: Path):
    assert load(smallest, ["seed=1", "seed=2"]).seed == 2


def test_overrides_come_before_validation(tmp_path: Path):
    path = written(tmp_path, "policy: {model: m}\nqueries: {path: q.jsonl, limit: none}\n")
    assert mistakes(path)[0].startswith("recipe.yaml:2: queries.limit: given 'none'")
    assert load(path, ["queries.limit=3"]).queries.limit == 3


def test_an_override_opens_a_section_that_was_off(smallest: Path):
    assert load(smallest).training.lora is None
    assert load(smallest, ["training.lora={}"]).training.lora == Lora()
    assert load(smallest, ["training.lora.rank=8"]).training.lora == Lora(rank=8)


def test_an_override_may_hold_equals_signs_and_nothing(smallest: Path):
    assert load(smallest, ["queries.path=a=b.jsonl"]).queries.path == "a=b.jsonl"
    assert load(smallest, ["generator.queries="]).generator.queries is None


def test_an_alias_is_not_changed_together_with_its_anchor(tmp_path: Path):
    path = written(tmp_path, "policy: {model: m}\nqueries: {path: q}\ngenerator: &a {beta: 0.3}\nalignment: *a\n")
    recipe = load(path, ["generator.beta=0.7"])
    assert (recipe.generator.beta, recipe.alignment.beta) == (0.7, 0.3)


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "0.0000005", "5E-7"])
def test_scientific_notation_is_a_number(smallest: Path, text: str):
    """YAML 1.1 reads 5e-7, without a point, as text."""
    assert load(smallest, [f"generator.learning_rate={text}"]).generator.learning_rate == 5e-7


@pytest.mark.parametrize("text", ["beta", "=3", "generator..beta=1", ".beta=1", "generator.beta"])
def test_what_is_not_an_override(smallest: Path, text: str):
    assert mistakes(smallest, text) == [f"override: {text!r} is not key=value, such as generator.beta=0.2"]


def test_an_override_below_a_plain_value(smallest: Path):
    assert mistakes(smallest, "policy.model.name=x") == [
        "override: policy.model.name: policy.model is 'some/model', not a section"
    ]


def test_an_override_that_is_not_yaml(smallest: Path):
    assert mistakes(smallest, "policy.model=@x")[0].startswith("override: policy.model: '@x' is not valid YAML; put it in")
    assert mistakes(smallest, "policy.date=2025-02-30")[0].startswith(
        "override: policy.date: '2025-02-30' is not valid YAML"
    )


# ---- what sections say ----------------------------------------------------------------------------------------------


def test_the_original_response_is_drawn_as_the_others_unless_it_is_said(smallest: Path):
    changes = ["responses.temperature=0.9", "responses.max_new_tokens=64", "responses.original.temperature=0"]
    responses = load(smallest, changes).responses
    assert responses.steered == Sampled(temperature=0.9, top_p=0.8, max_new_tokens=64)
    assert responses.bare == Sampled(temperature=0, top_p=0.8, max_new_tokens=64)
    assert load(smallest, ["responses.original={top_p: 1}"]).responses.bare == Sampled(temperature=0.7, top_p=1.0)


def test_the_pairs_may_have_a_temperature_of_their_own(smallest: Path):
    recipe = load(smallest, ["generator.temperature=0.4"])
    assert recipe.of_pairs == Sampled(temperature=0.4)
    assert recipe.responses.steered == recipe.responses.bare == Sampled(), "the policy answers as before"
    assert load(smallest).of_pairs == Sampled()
    (mistake,) = mistakes(smallest, "generator.temperature=0", "selection.samples=2")
    assert mistake.endswith("at generator.temperature 0 all samples are the same one")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generator.bata=1", "generator.bata: unknown key; did you mean generator.beta?"),
        ("generater.beta=1", "generater: unknown key; did you mean generator?"),
        ("generator.lr=1", "generator.lr: unknown key; did you mean generator.learning_rate?"),
        ("top_p=0.9", "top_p: unknown key; did you mean responses.top_p or responses.original.top_p?"),
        (
            "training.sft_weight=0",
            "training.sft_weight: unknown key; did you mean generator.sft_weight or alignment.sft_weight?",
        ),
        ("training.lora.rnk=4", "training.lora.rnk: unknown key; did you mean training.lora.rank?"),
        (
            "queries.zzz=1",
            "queries.zzz: unknown key; the keys of queries are"
            " path, column, split, limit, max_prompt_tokens, holdout, split_rounds, shard",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(smallest: Path, override: str, expected: str):
    assert mistakes(smallest, override) == [f"override: {expected}"]


def test_every_mistake_is_listed_with_its_place(tmp_path: Path):
    path = written(
        tmp_path,
        """\
policy:
  model: 12
queries:
  colum: prompt
generator:
  loss: xpo
  beta: 0
filters: 5
""",
    )
    assert sorted(mistakes(path, "seed=-1")) == [
        "override: seed: given -1, expected greater than or equal to 0",
        'recipe.yaml:2: policy.model: given 12, expected a valid string; put it in "quotes" if it is meant as text',
        "recipe.yaml:3: queries.path: missing;"
        " expected: A .jsonl, .json, .csv or .parquet file, or hub:NAME for a hub data set.",
        "recipe.yaml:4: queries.colum: unknown key; did you mean queries.column?",
        "recipe.yaml:6: generator.loss: given 'xpo',"
        " expected 'dpo', 'ipo', 'hinge', 'simpo', 'orpo', 'apo_zero', 'robust_dpo',"
        " 'sppo', 'dpo_norm', 'dpop', 'bdpo' or 'sft'",
        "recipe.yaml:7: generator.beta: given 0, expected greater than 0",
        "recipe.yaml:8: filters: given 5, expected a section with keys of its own",
    ]


def test_the_two_kinds_of_a_setting_are_one_mistake(smallest: Path):
    (line,) = mistakes(smallest, "training.lora.target_modules=3")
    assert line.startswith("override: training.lora.target_modules: given 3, expected a valid string")
    assert line.endswith("; or given 3, expected a valid list")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_rates_are_finite(smallest: Path, value: str):
    assert mistakes(smallest, f"generator.learning_rate={value}")[0].endswith("expected a finite number")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("source: file", "source: file needs principles.path, a JSONL file of principle pairs"),
        ("path: p.jsonl", "path 'p.jsonl' is read only with source: file; set principles.source=file or path=null"),
        ("model: m", "model 'm' writes only with source: generate; set principles.source=generate or model=null"),
    ],
)
def test_principle_settings_that_would_not_be_used(tmp_path: Path, settings: str, expected: str):
    path = written(tmp_path, f"policy: {{model: m}}\nqueries: {{path: q}}\nprinciples: {{{settings}}}\n")
    assert mistakes(path) == [f"recipe.yaml:3: principles: {expected}"]


# ---- engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("{}", "transformers"),
        ("{dtype: float32}", "transformers"),
        ("{kind: vllm, python: /env/bin/python, extra: {quantization: fp8}}", "vllm"),
        ("{kind: openai, serve: 'vllm serve {model} --port {port}'}", "openai"),
        ("{kind: ray, replicas: 4, replica: {batch_size: 8}}", "ray"),
        ("{kind: ray, address: auto, gpus: 2, replica: {kind: vllm, tensor_parallel_size: 2}}", "ray"),
    ],
)
def test_an_engine_is_a_section_of_its_kind_and_loads_back(tmp_path: Path, section: str, kind: str):
    path = written(tmp_path, f"policy: {{model: m}}\nqueries: {{path: q}}\nengine: {section}\n")
    recipe = load(path)
    assert recipe.engine.kind == kind
    assert load(written(tmp_path, describe(recipe))) == recipe
    assert load(written(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{kind: vlm}", ".kind: given 'vlm', expected 'transformers', 'vllm', 'openai', 'ray'"),
        ("5", ": given 5, expected a section with keys of its own"),
        ("{batch_siz: 3}", ".batch_siz: unknown key; did you mean {}.batch_size?"),
        (
            "{kind: vllm, batch_size: 3}",
            ".batch_size: not a key of kind vllm (of transformers); its keys are kind, python, replicas,"
            " tensor_parallel_size, dtype, max_num_seqs, max_model_len, gpu_memory_utilization, enable_prefix_caching,"
            " enforce_eager, start_seconds, extra",
        ),
        ("{kind: vllm, replicaz: 2}", ".replicaz: unknown key; did you mean {}.replicas?"),
        ("{kind: ray, replica: {batch_siz: 3}}", ".replica.batch_siz: unknown key; did you mean {}.replica.batch_size?"),
        ("{kind: ray, replica: {kind: ray}}", ".replica.kind: given 'ray', expected 'transformers', 'vllm'"),
        (
            "{kind: ray, replica: {kind: vllm, tensor_parallel_size: 2}}",
            ": the vLLM of a replica needs 2 GPUs, and gpus gives it 0",
        ),
        ("{kind: vllm, extra: {dtype: half}}", ": extra sets dtype, which the recipe sets elsewhere"),
        (
            "{kind: openai}",
            ": kind openai needs base_url and model, of a server that runs already, or serve, a command",
        ),
        (
            "{kind: openai, serve: 'x {model} {port}', base_url: 'http://h/v1'}",
            ": serve starts a server of its own; set base_url=null, or serve=null to use the one at base_url",
        ),
        (
            "{kind: openai, serve: 'x {model} {port}', serve_adapters: --lora-modules}",
            ": serve_adapters belongs to serve, and must have the word {adapters}, for NAME=FOLDER of each",
        ),
        ("{kind: openai, serve: 'x {model} {port}', tries: 0}", ".tries: given 0, expected greater than or equal to 1"),
    ],
)
@pytest.mark.parametrize("place", ["engine", "principles.engine"])
def test_mistakes_in_engines(smallest: Path, place: str, section: str, expected: str):
    expected = f"override: {place}{expected.replace('{}', place)}"
    assert mistakes(smallest, "principles.source=generate", f"{place}={section}") == [expected]


SERVER = "{kind: openai, base_url: 'http://h/v1', model: m}"


def test_a_server_that_runs_already_holds_nothing_that_a_run_trains(smallest: Path):
    (line,) = mistakes(smallest, f"engine={SERVER}")
    assert "engine: a server that runs already can't hold the weights" in line
    assert load(smallest, [f"engine={SERVER}", "generator.kind=none"]).engine.kind == "openai"
    assert "can't hold" in mistakes(smallest, f"engine={SERVER}", "generator.kind=none", "rounds=2")[0]
    principles = ["principles.source=generate", f"principles.engine={SERVER}"]
    assert load(smallest, principles).principles.engine is not None
    assert "say it in engine.model" in mistakes(smallest, *principles, "principles.model=other/model")[0]
    assert "engine writes only with source: generate" in mistakes(smallest, f"principles.engine={SERVER}")[0]


def test_only_what_changes_the_samples_is_part_of_their_keys(smallest: Path):
    """Kind, endpoints, commands and batch sizes come and go; what the server is sent stays with the sample."""

    def identity(section: str) -> dict[str, object]:
        return sampling_identity(load(smallest, [f"engine={section}", "generator.kind=none"]).engine)

    assert identity("{dtype: float32, batch_size: 3}") == {}
    assert identity("{kind: vllm, python: /p, replicas: 4}") == {}
    assert identity("{kind: vllm, extra: {quantization: fp8}}") == {"vllm": {"quantization": "fp8"}}
    assert identity("{kind: ray, address: auto, replicas: 4, replica: {batch_size: 3}}") == {}
    assert identity("{kind: ray, replica: {kind: vllm, extra: {quantization: fp8}}}") == {"vllm": {"quantization": "fp8"}}
    assert identity("{kind: openai, serve: 'x {model} {port}', send: token_ids}") == {}
    assert identity("{kind: openai, serve: 'x {model} {port}'}") == {"openai": {"send": "messages"}}
    assert identity("{kind: openai, base_url: 'http://h/v1', model: m, extra: {top_k: 9}}") == {
        "openai": {"model": "m", "send": "messages", "extra": {"top_k": 9}}
    }


# ---- names of runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["runs/a", "a", "/tmp/A.b_c-1", "runs/a/", "x" * 64])
def test_run_names(output: str):
    assert Recipe.model_validate({**SMALLEST, "output": output}).output == output


def test_a_recipe_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    """No shell sees what a recipe says, and pyarrow would read below the home folder what was written in one named ~."""
    monkeypatch.setenv("HOME", "/home/ann")
    recipe = Recipe.model_validate(
        {
            "policy": {"model": "~/model", "chat_template": "~/a.jinja"},
            "queries": {"path": "~/q.jsonl"},
            "quality": {"evaluation_files": ["~/a.csv", "hub~b"]},
            "output": "~/runs/a",
        }
    )
    assert (recipe.policy.model, recipe.policy.chat_template) == ("/home/ann/model", "/home/ann/a.jinja")
    assert (recipe.queries.path, recipe.output) == ("/home/ann/q.jsonl", "/home/ann/runs/a")
    assert recipe.quality.evaluation_files == ["/home/ann/a.csv", "hub~b"]


@pytest.mark.parametrize("output", ["", ".", "..", "runs/..", "runs/-a", "runs/.a", "runs/a b", "x" * 65, "runs/é"])
def test_names_that_no_run_may_have(output: str):
    with pytest.raises(RecipeError, match="1 to 64 letters, digits"):
        Recipe.model_validate({**SMALLEST, "output": output})


def test_python_callers_get_the_same_errors():
    with pytest.raises(RecipeError) as caught:
        Recipe.model_validate({**SMALLEST, "generator": {"bta": 1}})
    assert str(caught.value) == "recipe: generator.bta: unknown key; did you mean generator.beta?"


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_key_said_twice(tmp_path: Path):
    path = written(tmp_path, "policy: {model: m}\ngenerator:\n  beta: 1\n  beta: 2\n")
    assert mistakes(path) == ["recipe.yaml:4: generator.beta: said twice, first on line 3; keep one"]


def test_what_is_not_yaml(tmp_path: Path):
    assert mistakes(written(tmp_path, "policy: {model: m\nseed: 1\n"))[0].startswith("recipe.yaml:2: not valid YAML: ")
    (line,) = mistakes(written(tmp_path, "policy: {model: m, date: 2025-02-30}\n"))
    assert line.startswith("recipe.yaml: day is out of range for month; put it in quotes")


def test_yaml_that_would_run_code(tmp_path: Path):
    (line,) = mistakes(written(tmp_path, "policy: !!python/object/apply:os.system [echo]\n"))
    assert line.startswith("recipe.yaml:1: not valid YAML: could not determine a constructor")


def test_yaml_that_holds_itself(tmp_path: Path):
    assert any(
        "policy.b: unknown key" in line for line in mistakes(written(tmp_path, "policy: &a {b: *a}\nqueries: {path: q}\n"))
    )


def test_a_list_is_no_recipe(tmp_path: Path):
    assert mistakes(written(tmp_path, "- a\n"))[0].startswith("recipe.yaml: holds ['a']; expected sections")


def test_an_empty_recipe_lacks_what_has_no_default(tmp_path: Path):
    assert [line.split(";")[0] for line in mistakes(written(tmp_path, ""))] == [
        "recipe.yaml: policy: missing",
        "recipe.yaml: queries: missing",
    ]


def test_a_recipe_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: \xff\n")
    assert mistakes(path) == ["recipe.yaml: byte 6 is not UTF-8; save the recipe as UTF-8"]


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_no_such_file(tmp_path: Path, name: str):
    with pytest.raises(FileNotFoundError, match="no such recipe file"):
        load(tmp_path / name)


# ---- description ----------------------------------------------------------------------------------------------------


def test_description_as_text(smallest: Path):
    text = describe(load(smallest, ["generator.beta=0.5", "training.lora.rank=8"]))
    assert "# gamma, the weight of the SFT term on the chosen response.\n  sft_weight: 0.1\n" in text
    assert "  beta: 0.5  # default: 0.1\n" in text
    assert "  lora:  # default: null\n" in text
    assert "    rank: 8  # default: 16\n" in text
    assert "ipo | hinge | simpo | orpo | apo_zero | robust_dpo | sppo | dpo_norm | dpop | bdpo | sft]" in text
    assert text.count("# default:") == 3


def test_a_section_that_is_off_is_shown_as_a_comment(smallest: Path):
    assert "  lora: null\n  # lora:\n  #   # Rank of the update.\n  #   rank: 16\n" in describe(load(smallest))


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
text = st.text(min_size=1).filter(lambda value: not any("\ud800" <= character <= "\udfff" for character in value))


@settings(deadline=None, max_examples=40)  # files on a shared machine
@given(
    model=text,
    column=text,
    learning_rate=positive,
    beta=positive,
    limit=st.none() | st.integers(min_value=1),
    trackers=st.lists(text, max_size=3),
)
def test_what_is_written_loads_back(tmp_path_factory: pytest.TempPathFactory, **drawn: object):
    recipe = Recipe.model_validate(
        {
            "policy": {"model": drawn["model"]},
            "queries": {"path": "q.jsonl", "column": drawn["column"], "limit": drawn["limit"]},
            "generator": {"learning_rate": drawn["learning_rate"], "beta": drawn["beta"]},
            "training": {"report_to": drawn["trackers"]},
        }
    )
    folder = tmp_path_factory.mktemp("recipe")
    assert load(written(folder, describe(recipe))) == recipe
    assert load(written(folder, dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{processes: 2}", "launcher.processes need launcher.kind: accelerate or ray"),
        ("{config: fsdp.yaml}", "launcher.config need launcher.kind: accelerate"),
        ("{kind: accelerate, processes: 2, cpus: 4}", "launcher.cpus need launcher.kind: ray"),
        ("{kind: accelerate}", "kind: accelerate needs launcher.processes or launcher.config"),
        ("{kind: accelerate, processes: 1}", "kind: accelerate starts several processes; one is launcher.kind: local"),
        ("{kind: ray}", "kind: ray needs launcher.processes"),
        ("{kind: ray, processes: 2, config: fsdp.yaml}", "launcher.config need launcher.kind: accelerate"),
        ("{kind: ray, processes: 2, address: 'ray://h:10001'}", "Ray Train does not run through a Ray client"),
    ],
)
def test_mistakes_in_launchers(smallest: Path, section: str, expected: str):
    (line,) = mistakes(smallest, f"launcher={section}")
    assert line.startswith("override: launcher: ")
    assert expected in line


def test_a_bound_without_its_direction(smallest: Path):
    assert mistakes(smallest, "quality.gates.accuracy=0.6") == [
        'override: quality.gates: gate accuracy: given 0.6, expected a bound with its direction, such as ">= 0.6"'
    ]


def test_one_tracker_may_stand_without_a_list(smallest: Path):
    assert load(smallest, ["training.report_to=wandb"]).training.report_to == ["wandb"]
    assert load(smallest, ["training.report_to=[wandb, tensorboard]"]).training.report_to == ["wandb", "tensorboard"]
    assert load(smallest).training.report_to == []
