import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longtail_experts.config import (
    LOSS_NAMES,
    Config,
    ConfigError,
    find_recipe,
    load_config,
    make_config,
    nearest,
    read_recipe,
    shorten,
    to_text,
)

# A busy machine is slow, not wrong.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FULL_RECIPE = {
    "loss": "ce",
    "tau": 1.0,
    "beta": 0.9999,
    "gamma": 2.0,
    "reweight_from": None,
    "protocol": "experts",
    "source": "cifar100",
    "data_dir": "data",
    "imbalance_factor": 100.0,
    "imbalance_profile": "exp",
    "images_per_class": None,
    "subset_rule": "own",
    "split_seed": 42,
    "seed": 0,
    "expert_seed": None,
    "shortcut": "projection",
    "epochs": 256,
    "batch_size": 128,
    "augmentation": "plain",
    "cutout": 0,
    "mixup": 0.0,
    "lr": 0.4,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "milestones": (96, 192, 224),
    "lr_decay": 0.1,
    "lr_schedule": "milestones",
    "warmup_steps": 68,
    "warmup_epochs": 0,
    "validation_every": 10,
    "early_stopping_patience": None,
    "checkpoint_every": 10,
    "device": "auto",
    "precision": "auto",
    "fast": True,
    "fused": False,
    "register_as": None,
    "preflight": True,
}


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@st.composite
def configs(draw) -> Config:
    count = st.integers(1, 10**9)
    seed = st.integers(0, 2**31 - 1)
    loss = draw(st.sampled_from([*LOSS_NAMES, "all"]))
    source = draw(st.sampled_from(["cifar100", "cifar10", "images", "synthetic"]))
    profile = draw(st.sampled_from(["exp", "step", "natural"]))
    is_literature = draw(st.booleans())
    warmup_steps = draw(st.integers(0, 10**9))
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
    return make_config(
        {
            "loss": loss,
            "tau": draw(st.floats(0, 10)),
            "beta": draw(st.floats(0, 1, exclude_max=True)),
            "gamma": draw(st.floats(0, 10)),
            "reweight_from": draw(st.none() | st.integers(0, 10**9)),
            "protocol": "literature" if is_literature else "experts",
            "source": source,
            "data_dir": draw(
                st.none() | text.filter(bool) | st.sampled_from(["~", "null", "yes", "1", "1e3"])
            ),
            "imbalance_factor": draw(st.floats(1, 1e6)),
            "imbalance_profile": profile,
            "images_per_class": None
            if profile == "natural" and source != "synthetic"
            else draw(st.none() | count),
            "subset_rule": "ldam" if source.startswith("cifar") and draw(st.booleans()) else "own",
            "split_seed": draw(seed),
            "seed": draw(seed),
            "expert_seed": None if loss == "all" else draw(st.none() | seed),
            "shortcut": draw(st.sampled_from(["projection", "pad"])),
            "epochs": draw(count),
            "batch_size": draw(count),
            "augmentation": draw(st.sampled_from(["plain", "autoaugment", "randaugment"])),
            "cutout": draw(st.integers(0, 32)),
            "mixup": draw(st.just(0) | st.floats(1e-3, 10)),
            "lr": draw(st.floats(0, 100, exclude_min=True)),
            "momentum": draw(st.floats(0, 1, exclude_max=True)),
            "weight_decay": draw(st.floats(0, 1)),
            "milestones": sorted(draw(st.sets(count, max_size=4))),
            "lr_decay": draw(st.floats(0, 1, exclude_min=True)),
            "lr_schedule": draw(st.sampled_from(["milestones", "cosine"])),
            "warmup_steps": warmup_steps,
            "warmup_epochs": 0 if warmup_steps > 1 else draw(st.integers(0, 10**6)),
            "validation_every": draw(count),
            "early_stopping_patience": None if is_literature else draw(st.none() | count),
            "checkpoint_every": draw(count),
            "device": draw(st.sampled_from(["auto", "cpu", "cuda"])),
            "precision": draw(st.sampled_from(["auto", "fp32", "bf16"])),
            "fast": draw(st.booleans()),
            "fused": draw(st.booleans()),
            "register_as": None
            if is_literature
            else draw(st.sampled_from([None, "experts", "CIFAR-100 LT v1.0"])),
            "preflight": draw(st.booleans()),
        }
    )


# --- the fields -------------------------------------------------------------------------------


def test_defaults_are_the_full_recipe():
    assert Config().model_dump() == FULL_RECIPE


def test_recipe_card_equals_the_defaults():
    assert load_config(str(CONFIGS / "cifar100_lt.yaml"), {}) == Config()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_card_is_valid_and_says_what_it_is_for(path):
    load_config(str(path), {})
    head = path.read_text(encoding="utf-8").split("loss:")[0]
    assert all(word in head for word in ("# purpose", "# command"))


@pytest.mark.parametrize("name", FULL_RECIPE)
def test_every_field_is_described_for_help(name):
    assert Config.model_fields[name].description


def test_config_is_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 1.0
    assert config.lr == 0.4
    assert hash(config) == hash(Config())


def test_replace_is_a_validated_copy():
    config = Config()
    assert config.replace(loss="logit_adjust", lr="0.1").lr == 0.1
    assert config == Config()
    with pytest.raises(ConfigError, match=r"^lr=-1: "):
        config.replace(lr=-1)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "12", 12),
        ("epochs", "2.0", 2),
        ("lr", "1e-2", 0.01),
        ("tau", "0", 0.0),
        ("imbalance_factor", "50", 50.0),
        ("milestones", "96,192,224", (96, 192, 224)),
        ("milestones", "3, 5", (3, 5)),
        ("milestones", "7", (7,)),
        ("milestones", 7, (7,)),
        ("milestones", [3, 5], (3, 5)),
        ("milestones", "none", ()),
        ("milestones", None, ()),
        ("milestones", "", ()),
        ("early_stopping_patience", "none", None),
        ("early_stopping_patience", "3", 3),
        ("images_per_class", "none", None),
        ("expert_seed", "none", None),
        ("expert_seed", "0", 0),
        ("data_dir", "none", None),
        ("data_dir", "my data", "my data"),
        ("split_seed", "2147483647", 2**31 - 1),
        ("warmup_steps", "0", 0),
        ("cutout", "16", 16),
        ("cutout", "32", 32),
        ("mixup", "0.4", 0.4),
        ("mixup", "0", 0.0),
        ("mixup", "0.001", 0.001),
    ],
)
def test_good_values(name, text, value):
    got = getattr(make_config({name: text}), name)
    assert got == value
    assert type(got) is type(value)


BAD_VALUES = [
    ("loss", "cross_entropy"),
    ("loss", "none"),
    ("loss", ""),
    ("tau", "-0.1"),
    ("tau", "nan"),
    ("source", "cifar1000"),
    ("imbalance_factor", "0.5"),
    ("imbalance_factor", "inf"),
    ("imbalance_factor", "1e7"),
    ("imbalance_profile", "linear"),
    ("images_per_class", "0"),
    ("split_seed", "-1"),
    ("split_seed", "2147483648"),
    ("seed", "none"),
    ("seed", "1.5"),
    ("expert_seed", "-3"),
    ("shortcut", "identity"),
    ("epochs", "abc"),
    ("epochs", "0"),
    ("epochs", "2.5"),
    ("epochs", "none"),
    ("batch_size", "-128"),
    ("batch_size", "1e10"),
    ("augmentation", "auto"),
    ("augmentation", "none"),
    ("cutout", "-1"),
    ("cutout", "33"),
    ("cutout", "1.5"),
    ("mixup", "-0.1"),
    ("mixup", "10.5"),
    ("mixup", "1e-310"),
    ("mixup", "nan"),
    ("lr", "-1"),
    ("lr", "0"),
    ("lr", "nan"),
    ("lr", "inf"),
    ("lr", "-inf"),
    ("lr", "0.1.2"),
    ("lr", "0,4"),
    ("momentum", "1"),
    ("weight_decay", "-1e-4"),
    ("milestones", "192,96"),
    ("milestones", "96,96"),
    ("milestones", "0,96"),
    ("milestones", "-5"),
    ("milestones", "96,x"),
    ("milestones", "96,"),
    ("milestones", "96;192"),
    ("milestones", "1.5,2"),
    ("lr_decay", "0"),
    ("lr_decay", "1.1"),
    ("warmup_steps", "-1"),
    ("warmup_steps", "none"),
    ("validation_every", "0"),
    ("early_stopping_patience", "0"),
    ("checkpoint_every", "never"),
    ("device", "gpu"),
    ("precision", "fp16"),
]


@pytest.mark.parametrize(("name", "text"), BAD_VALUES)
def test_bad_value_is_one_line_that_names_field_and_value(name, text):
    with pytest.raises(ConfigError) as error:
        make_config({name: text})
    line = str(error.value)
    assert line.startswith(f"{name}={text}: ")
    assert "\n" not in line
    assert Config.model_fields[name].description in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("milestones", [192, 96], "192,96"),
        ("milestones", 96.5, "96.5"),
        ("milestones", {"a": 1}, "{'a': 1}"),
        ("epochs", [1, 2], "[1, 2]"),
        ("data_dir", 5, "5"),
        ("lr", float("nan"), "nan"),
        ("lr", float("inf"), "inf"),
    ],
)
def test_bad_values_of_other_types(name, value, shown):
    with pytest.raises(ConfigError) as error:
        make_config({name: value})
    assert str(error.value).startswith(f"{name}={shown}: ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan")])
@pytest.mark.parametrize("name", ["tau", "lr", "imbalance_factor", "weight_decay"])
def test_floats_are_finite(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}={value}: should be a finite number"):
        make_config({name: value})


@pytest.mark.parametrize(("name", "value"), [("lr", True), ("epochs", False), ("data_dir", True)])
def test_booleans_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name}={str(value).lower()}: not a yes/no field$"):
        make_config({name: value})


@pytest.mark.parametrize(
    ("given_", "meant"),
    [("logit-adjust", "logit_adjust"), ("balanced-softmax", "balanced_softmax"), ("CE", None)],
)
def test_unknown_loss_suggests_or_lists(given_, meant):
    with pytest.raises(ConfigError) as error:
        make_config({"loss": given_})
    says = (
        f"did you mean {meant}?" if meant else "one of: ce, logit_adjust, balanced_softmax, class_"
    )
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("given_", "meant"),
    [("epoch", "epochs"), ("lr_decy", "lr_decay"), ("Loss", "loss"), ("sede", "seed")],
)
def test_unknown_field_suggests_the_nearest(given_, meant):
    with pytest.raises(ConfigError) as error:
        make_config({given_: "1"})
    assert str(error.value) == f"unknown field '{given_}'; did you mean {meant}?"


def test_unknown_field_like_no_other_lists_all():
    with pytest.raises(ConfigError, match=r"^unknown field 'zzz'; one of: ") as error:
        make_config({"zzz": 1})
    assert all(name in str(error.value) for name in FULL_RECIPE)


def test_unknown_field_is_told_before_a_bad_value():
    with pytest.raises(ConfigError, match="unknown field 'epoch'"):
        make_config({"lr": "-1", "epoch": 3})


@pytest.mark.parametrize("name", [n for n in FULL_RECIPE if n != "data_dir"])
@pytest.mark.parametrize("value", ["x" * 10_000, "9" * 10_000, "a\nb\x1b[2J\0" * 1000])
def test_long_and_dirty_values_stay_one_short_line(name, value):
    with pytest.raises(ConfigError) as error:
        make_config({name: value})
    line = str(error.value)
    assert line.startswith(f"{name}=")
    assert f"({len(value)} characters)" in line
    assert len(line) < 400
    assert line.isprintable()


def test_long_unknown_field_stays_one_line():
    with pytest.raises(ConfigError) as error:
        make_config({"x" * 10_000: 1})
    assert "(10000 characters)" in str(error.value)
    assert len(str(error.value)) < 700


def test_expert_seed_with_all_losses_is_refused():
    with pytest.raises(ConfigError, match=r"^expert_seed=3: with loss=all .* give seed"):
        make_config({"loss": "all", "expert_seed": "3"})
    assert make_config({"loss": "ce", "expert_seed": "3"}).expert_seed == 3


def test_a_size_of_the_pool_that_natural_would_not_heed_is_refused():
    settings = {"imbalance_profile": "natural", "images_per_class": 20}
    with pytest.raises(ConfigError, match=r"^images_per_class=20: .*natural takes .* none"):
        make_config(settings)
    for heeds in ({"source": "synthetic"}, {"imbalance_profile": "step"}):
        assert make_config(settings | heeds).images_per_class == 20


# --- YAML and text ----------------------------------------------------------------------------


@relaxed
@given(configs())
def test_yaml_reads_back_equal(config):
    values = yaml.safe_load(config.to_yaml())
    assert list(values) == list(FULL_RECIPE)
    assert make_config(values) == config


@relaxed
@given(configs())
def test_text_reads_back_equal(config):
    text = config.as_text()
    assert list(text) == list(FULL_RECIPE)
    assert all(isinstance(value, str) for value in text.values())
    assert make_config(text) == config


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        ((), "none"),
        ((96, 192), "96,192"),
        (100.0, "100"),
        (0.1, "0.1"),
        (1e-4, "0.0001"),
        (0.0, "0"),
        (1234567.0, "1234567"),
        (1e20, "1e+20"),
        (float("inf"), "inf"),
        (7, "7"),
        ("ce", "ce"),
    ],
)
def test_text_of_values(value, text):
    assert to_text(value) == text


def test_written_file_is_a_recipe(recipe_file):
    config = make_config({"loss": "logit_adjust", "milestones": "none", "data_dir": "none"})
    assert load_config(recipe_file(config.to_yaml()), {}) == config


@pytest.mark.parametrize(
    ("value", "shown"),
    [("abc", "abc"), ("a\nb", "a?b"), ("x" * 60, "x" * 60), (5, "5"), (None, "None")],
)
def test_shorten(value, shown):
    assert shorten(value) == shown


def test_shorten_says_how_long_it_was():
    assert shorten("x" * 61) == "x" * 60 + "... (61 characters)"


def test_nearest_of_nothing_close_lists_all():
    assert nearest("demoo", ["demo", "full"]) == "; did you mean demo?"
    assert nearest("qqq", ["demo", "full"]) == "; one of: demo, full"


# --- recipes ----------------------------------------------------------------------------------


def test_overrides_win_over_the_recipe(recipe_file):
    path = recipe_file("epochs: 3\nlr: 0.2\nearly_stopping_patience: 4\n")
    config = load_config(path, {"lr": "0.3", "early_stopping_patience": "none"})
    assert (config.epochs, config.lr, config.early_stopping_patience) == (3, 0.3, None)
    assert config.momentum == 0.9


@pytest.mark.parametrize("text", ["early_stopping_patience: none", "early_stopping_patience: ~"])
def test_none_in_yaml(recipe_file, text):
    assert load_config(recipe_file(text), {}).early_stopping_patience is None


def test_numbers_in_yaml_are_decimal(recipe_file):
    text = "epochs: 010\nmilestones: [004, 1_0]\nlr: 1e-1\nmomentum: .9\nseed: -0"
    config = load_config(recipe_file(text), {})
    assert (config.epochs, config.milestones, config.seed) == (10, (4, 10), 0)
    assert (config.lr, config.momentum) == (0.1, 0.9)


@pytest.mark.parametrize("word", ["false", "False", "no", "off"])
def test_false_in_yaml(recipe_file, word):
    assert load_config(recipe_file(f"fast: {word}"), {}).fast is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch: 3", "unknown field 'epoch'; did you mean epochs?"),
        ("epochs: 0x10", "epochs=0x10: "),
        ("epochs: 1:30", "epochs=1:30: "),
        ("lr: 1:30.5", "lr=1:30.5: "),
        ("lr: .inf", "lr=.inf: "),
        ("epochs: abc", "epochs=abc: "),
        ("lr: true", "lr=true: not a yes/no field"),
        ("lr: yes", "lr=yes: "),
        ("loss: no", "loss=no: "),
        ("1: 2", "unknown field '1'"),
        ("epochs: 256\nlr: 0.1\nepochs: 2", "epochs: given 2 times"),
        ("", "must hold `field: value` lines"),
        ("- epochs", "must hold `field: value` lines"),
        ("epochs: [1", "cannot be read"),
        ("epochs: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("epochs: " + "[" * 1000, "cannot be read"),
    ],
)
def test_bad_recipe_names_the_file_and_what_is_wrong(recipe_file, text, says):
    path = recipe_file(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, {})
    line = str(error.value)
    assert line.startswith(f"config={path}: {says}")
    assert line.count(path) == 1
    assert "\n" not in line


def test_recipe_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"epochs: \xff\xfe")
    with pytest.raises(ConfigError, match=r"^config=.*binary\.yaml: cannot be read"):
        read_recipe(path)


def test_bad_override_does_not_blame_the_file(recipe_file):
    with pytest.raises(ConfigError, match=r"^lr=-1: "):
        load_config(recipe_file("lr: 0.1"), {"lr": "-1"})


def test_bare_name_is_looked_up_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo").resolve() == CONFIGS / "demo.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("epochs: 77\n")
    (tmp_path / "configs" / "own.yaml").write_text("epochs: 78\n")
    assert load_config("demo", {}).epochs == 77
    assert load_config("own", {}).epochs == 78


def test_unknown_recipe_suggests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^config=demmo: no such file; did you mean demo\?$"):
        load_config("demmo", {})
    with pytest.raises(ConfigError, match=r"^config=qqq: no such file; one of: cifar100_lt, demo"):
        load_config("qqq", {})


@pytest.mark.parametrize("name", ["", ".", "/", "no/such.yaml", "a\0b.yaml"])
def test_what_is_no_recipe_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^config=.*: no such file") as error:
        load_config(name, {})
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "content", ["data_dir: 2024-13-45", f"epochs: {'9' * 5000}", "milestones: [true]", "\0"]
)
def test_yaml_that_python_cannot_take_is_one_line(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml: ") as error:
        load_config(str(path), {})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "nul\0byte"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(name, {})


def test_an_integer_too_long_to_print():
    with pytest.raises(ConfigError, match="epochs=a int too long to print"):
        make_config({"epochs": 10**5000})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: [2]", "epochs=[2]: should be a valid integer"),
        ("milestones: [5, 3]", "milestones=5,3: must be positive epochs in increasing order"),
        ("data_dir: 2024", "data_dir=2024: should be a valid string, in quotes"),
    ],
)
def test_a_value_is_shown_as_it_was_given(recipe_file, text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(recipe_file(text), {})


def test_home_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert make_config({"data_dir": "~/images"}).data_dir == "/home/someone/images"
