"""Every wrong configuration is one line that names the key, told before torch is imported and anything is
built.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.__main__ import checked_job
from experiments.vlm import check as vlm_checks
from experiments.vlm.config import VLMJobConfig
from tests.reference.wrong_jobs import CP2, DATA, PP2, TP2, ZERO_BUBBLE, C, P, told
from torchtitan.config import check as checks
from torchtitan.config.check import is_allowed
from torchtitan.config.parse import option_types

REPOSITORY = Path(__file__).parents[2]
SOURCE = '[[data.sources]]\nformat = "{}"\npath = "assets"\n'
IN_HF = C + "initial_load_in_hf"
pytestmark = pytest.mark.usefixtures("repository_without_gpu")


# (options, processes, the key that the message must name)
WRONG = [
    (["--profiling.profile_freq", "0"], 1, "profiling.profile_freq"),
    (["--metrics.log_freq", "0"], 1, "metrics.log_freq"),
    (["--optimizer.lr", "0"], 1, "optimizer.lr"),
    (["--optimizer.lr", "nan"], 1, "optimizer.lr"),
    (["--optimizer.lr", "inf"], 1, "optimizer.lr"),
    (["--optimizer.muon_lr", "-1"], 1, "optimizer.muon_lr"),
    (["--optimizer.muon_momentum", "1"], 1, "optimizer.muon_momentum"),
    (["--optimizer.beta1", "1.0"], 1, "optimizer.beta1"),
    (["--optimizer.beta2", "-0.1"], 1, "optimizer.beta2"),
    (["--optimizer.eps", "0"], 1, "optimizer.eps"),
    (["--optimizer.weight_decay", "-0.1"], 1, "optimizer.weight_decay"),
    (["--lr_scheduler.warmup_steps", "-1"], 1, "lr_scheduler.warmup_steps"),
    (["--lr_scheduler.decay_ratio", "0"], 1, "lr_scheduler.decay_ratio"),
    (["--lr_scheduler.decay_ratio", "1.5"], 1, "lr_scheduler.decay_ratio"),
    (["--lr_scheduler.decay_type", "square"], 1, "lr_scheduler.decay_type"),
    (["--lr_scheduler.min_lr_factor", "2"], 1, "lr_scheduler.min_lr_factor"),
    (["--training.steps", "0"], 1, "training.steps"),
    (["--training.seq_len", "0"], 1, "training.seq_len"),
    (["--training.local_batch_size", "0"], 1, "training.local_batch_size"),
    (["--training.global_batch_size", "0"], 1, "training.global_batch_size"),
    (["--training.global_batch_size", "12"], 1, "training.global_batch_size = 12"),
    (["--training.global_batch_size", "8"], 2, "training.global_batch_size = 8"),
    (["--training.max_norm", "-1"], 1, "training.max_norm"),
    (["--training.gc_freq", "0"], 1, "training.gc_freq"),
    (["--training.loss_chunk_tokens", "0"], 1, "training.loss_chunk_tokens"),
    (["--training.freeze", "encoder", "layers.(0"], 1, "training.freeze = layers.(0: no regular expression"),
    (["--training.freeze", ""], 1, "training.freeze is empty"),
    (["--training.enable_cpu_offload"], 1, "training.enable_cpu_offload"),
    (["--training.mixed_precision_param", "float16"], 1, "training.mixed_precision_param"),
    ([C + "interval", "0"], 1, "checkpoint.interval"),
    ([C + "keep_latest_k", "-1"], 1, "checkpoint.keep_latest_k"),
    ([C + "load_step", "3"], 1, "checkpoint.load_step"),
    ([C + "last_save_model_only"], 1, "checkpoint.last_save_model_only"),
    ([C + "last_save_in_hf"], 1, "checkpoint.last_save_in_hf needs checkpoint.enable"),
    ([C + "enable", C + "last_save_in_hf", "--data.resize", "square"], 1, "data.resize = square"),
    ([C + "folder", "/absolute"], 1, "checkpoint.folder"),
    ([C + "folder", "../above"], 1, "checkpoint.folder"),
    ([C + "initial_load_path", "nowhere"], 1, "checkpoint.initial_load_path = nowhere"),
    ([C + "initial_load_in_hf"], 1, "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path"),
    ([C + "initial_load_allow", "missing"], 1, "checkpoint.initial_load_allow needs"),
    ([C + "initial_load_encoder_path", "tests"], 1, "checkpoint.initial_load_encoder_path needs"),
    ([IN_HF, C + "initial_load_path", "tests"], 1, "tests/config.json: No such file"),
    ([IN_HF, C + "initial_load_path", "no"], 1, "checkpoint.initial_load_path = no: no such folder"),
    ([C + "exclude_from_loading", "optimiser"], 1, "checkpoint.exclude_from_loading = optimiser"),
    (["--job.dump_folder", "pyproject.toml"], 1, "job.dump_folder"),
    (["--model.flavor", "debugmodle"], 1, "= debugmodle: no such flavor; did you mean debugmodel?"),
    (["--model.tokenizer_path", "nowhere"], 1, "model.tokenizer_path = nowhere"),
    (["--model.tokenizer_path", "tests"], 1, "model.tokenizer_path = tests: holds neither"),
    (["--model.attention_backend", "flex"], 1, "model.attention_backend"),
    (["--compile.cuda_graphs"], 1, "compile.cuda_graphs"),
    (["--profiling.enable_memory_snapshot"], 1, "profiling.enable_memory_snapshot"),
    (["--activation_checkpoint.selective_ac_option", "ops"], 1, "activation_checkpoint.selective_ac_option"),
    (["--activation_checkpoint.selective_ac_option", "0"], 1, "activation_checkpoint.selective_ac_option"),
    (["--validation.freq", "0"], 1, "validation.freq"),
    (["--debug.seed", str(2**32)], 1, "debug.seed = 4294967296: must be >= 0, <= 4294967295"),
    (["--comm.init_timeout_seconds", "99999999999999"], 1, "comm.init_timeout_seconds"),
    (["--validation.enable"], 1, "validation.sources"),
    (["--validation.controls"], 1, "validation.controls"),
    (["--debug.seed", "-1"], 1, "debug.seed"),
    (["--comm.train_timeout_seconds", "0"], 1, "comm.train_timeout_seconds"),
    # vision
    (["--data.patch_size", "14"], 1, "data.patch_size = 14"),
    (["--data.patches_per_row", "1022"], 1, "data.patches_per_row = 1022"),
    (["--data.max_patches_per_image", "1022"], 1, "use 1020 or 1024"),
    (["--data.max_patches_per_image", "2048"], 1, "data.max_patches_per_image = 2048"),
    (["--data.min_patches_per_image", "2000"], 1, "data.min_patches_per_image = 2000"),
    (["--data.max_pixels_per_image", "0"], 1, "data.max_pixels_per_image"),
    (["--data.max_pixels_per_image", "1000"], 1, "less than a visual token, which is 32 x 32 pixels"),
    (["--data.max_tokens_per_image", "300"], 1, "data.max_tokens_per_image = 300 is more than a row holds"),
    (["--data.min_tokens_per_image", "300"], 1, "data.min_tokens_per_image = 300 is more than data.max_pat"),
    (
        ["--data.max_tokens_per_image", "64", "--data.max_pixels_per_image", "65536"],
        1,
        "data.max_pixels_per_image and data.max_tokens_per_image say the same",
    ),
    (["--data.spatial_merge_size", "0"], 1, "data.spatial_merge_size"),
    (["--data.spatial_merge_size", "3"], 1, "data.patches_per_row"),
    (["--data.patch_rows", "0"], 1, "data.patch_rows"),
    (["--training.seq_len", "256"], 1, "data.max_patches_per_image = 1024 makes 258 tokens"),
    (["--model.flavor", "llava-1.5-7b", "--data.patches_per_row", "576"], 1, "336 pixels takes 577 patches"),
    (["--model.flavor", "llava-1.5-7b", "--training.seq_len", "500"], 1, "336 pixels makes 576 tokens"),
    (["--data.packing_buffer_size", "0"], 1, "data.packing_buffer_size"),
    (["--data.num_workers", "-1"], 1, "data.num_workers"),
    (["--data.decode_threads", "0"], 1, "data.decode_threads"),
    (["--data.max_bad_fraction", "0"], 1, "data.max_bad_fraction"),
    (["--data.url_timeout_s", "0"], 1, "data.url_timeout_s"),
    (["--data.resize", "pad"], 1, "data.resize = pad: no such image plan; did you mean padded?"),
    (
        ["--training.dataset", "obelisk"],
        1,
        "training.dataset = obelisk: no such format; did you mean obelics?",
    ),
    (["--training.dataset", ""], 1, "training.dataset is missing"),
    (["--training.dataset_path", ""], 1, "training.dataset_path is missing"),
    (["--training.dataset_path", "nowhere/*.tar"], 1, "training.dataset_path = nowhere/*.tar: no such file"),
    (["--training.dataset_path", "nowhere-{00..07}.tar"], 1, "training.dataset_path"),
    (["--training.dataset_path", "embedded:caption/train"], 1, "did you mean embedded:captions/train?"),
]


@pytest.mark.parametrize(
    ("options", "world_size", "key"), WRONG, ids=[" ".join(options) + f" x{n}" for options, n, _ in WRONG]
)
def test_wrong_configuration_is_told_by_its_key(options, world_size, key):
    assert key in told([*DATA, *options], world_size)


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ([], 1),
        ([], 2),
        (["--training.global_batch_size", "32"], 2),
        ([*TP2, *CP2, *PP2], 8),
        ([*TP2, P + "encoder_tensor_parallel"], 2),
        ([*TP2, P + "encoder_sharing", "on"], 2),
        ([*CP2, P + "context_parallel_method", "ulysses"], 2),
        ([*CP2, P + "context_parallel_method", "ulysses", "--training.seq_len", "2052"], 2),
        ([*PP2, P + "pipeline_parallel_split_points", "2"], 2),
        ([*PP2, P + "pipeline_parallel_encoder_stage", P + "pipeline_parallel_split_points", "0"], 2),
        (ZERO_BUBBLE, 2),
        ([*ZERO_BUBBLE, "--activation_checkpoint.mode", "full"], 2),
        (["--training.dataset_path", "s3://bucket/{000..100}.tar"], 1),
        (["--training.dataset_path", "assets/{a..z}*"], 1),
        (["--training.freeze", "encoder", "decoder"], 1),
    ],
    ids=str,
)
def test_right_configurations_pass(options, world_size, tmp_path):
    checked_job([*DATA, *options], world_size)


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ("", "data.sources is empty"),
        ('[[data.sources]]\npath = "assets"', "data.sources[0].format is missing"),
        ('[[data.sources]]\nformat = "cc12m"', "data.sources[0].path is missing"),
        (SOURCE.format("cc12"), "data.sources[0].format = cc12: no such format; did you mean cc12m?"),
        ('[[data.sources]]\nformat = "cc12m"\npath = "nowhere"', "data.sources[0].path = nowhere"),
        (SOURCE.format("cc12m") + "weight = 0", "data.sources[0].weight = 0.0"),
        (SOURCE.format("cc12m") + "weight = inf", "data.sources[0].weight = inf"),
        (SOURCE.format("cc12m") + "shuffle_buffer = 0", "data.sources[0].shuffle_buffer"),
        (SOURCE.format("messages") + 'chat_template = "chatm"', "data.sources[0].chat_template"),
        (
            SOURCE.format("text") + 'columns.image = "photo"',
            "data.sources[0].columns.image = photo: format text",
        ),
        (SOURCE.format("cc12m") + 'columns.imag = ""', "did you mean data.sources[0].columns.image?"),
        (SOURCE.format("cc12m") * 2, "data.sources: two sources have the name cc12m"),
        (
            '[training]\ndataset = "cc12m"\ndataset_path = "assets"\n[[data.sources]]\nformat = "text"\npath '
            '= "assets"',
            "training.dataset and",
        ),
        (
            '[validation]\nenable = true\n[[data.sources]]\nformat = "cc12m"\npath = '
            '"assets"\n[[validation.sources]]\nformat = "cc12m"',
            "validation.sources[0].path",
        ),
    ],
)
def test_wrong_sources_are_told_by_their_place(tables, key, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(tables)
    assert key in told(["--job.config_file", str(file)])


def test_how_a_single_dataset_is_read_is_checked_too(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('[[data.sources]]\nchat_template = "chatm"')
    assert "data.sources[0].chat_template = chatm: neither" in told(["--job.config_file", str(file), *DATA])


@pytest.mark.parametrize(
    "file",
    # What makes many jobs of one is looked at in test_sweep_run.
    sorted(file for file in (REPOSITORY / "train_configs").rglob("*.toml") if "sweeps" not in file.parts),
    ids=lambda file: file.stem,
)
def test_shipped_configurations_pass_once_their_data_are_there(file, tmp_path):
    """Real data and tokenizers are not in the repository, so the embedded ones stand in for what is not; and
    without published weights, or those of the stage before, only a dry run starts.
    """
    argv = ["--job.config_file", str(file)]
    argv += ["--job.dry_run"] if "initial_load_" in file.read_text() else []
    if "embedded:" not in file.read_text():
        argv += [*DATA, "--model.tokenizer_path", "assets/tokenizer", "--validation.no_enable"]
    checked_job(argv, 8)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("lr = 1e-4", "optimizer.groups[0].pattern is empty"),
        ('pattern = "layers.(0"', "optimizer.groups[0].pattern = layers.(0: no regular expression"),
        ('pattern = "encoder"\nlr = 0', "optimizer.groups[0].lr = 0.0: must be > 0"),
        ('pattern = "encoder"\nweight_decay = -1', "optimizer.groups[0].weight_decay = -1.0"),
        ('pattern = "encoder"\nlayer_decay = 1.5', "optimizer.groups[0].layer_decay = 1.5"),
        ('pattern = "encoder"\nschedule_factor = 0', "optimizer.groups[0].schedule_factor = 0.0"),
        ('pattern = "encoder"\nmuon_lr = 0.1', "optimizer.groups[0].muon_lr = 0.1 needs optimizer.name"),
        ('pattern = "a"\n[[optimizer.groups]]\npattern = "b"\nname = "a"', "another group is called a too"),
        ('pattern = "encoder"\nbeta1 = 0.1', "optimizer.groups[0].beta1 is not a known option"),
    ],
)
def test_wrong_groups_are_told_by_their_place(table, message, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(f"[[optimizer.groups]]\n{table}\n")
    assert message in told(["--job.config_file", str(file), *DATA])


def test_squares_differ_from_native_in_nothing_but_the_resizing():
    """And in the slot's shape and largest image, so that a step sees as many images although squares take
    more patches.
    """
    native, square = (
        checked_job(["--job.config_file", f"train_configs/{name}.toml"], 1)
        for name in ("vlm_sees", "vlm_sees_square")
    )
    shape = {name: getattr(native.data, name) for name in ("patches_per_row", "max_patches_per_image")}
    square.job, square.data = native.job, replace(square.data, resize="native", **shape)
    square.training = replace(square.training, seq_len=native.training.seq_len)
    assert square == native


def test_every_number_has_a_range():
    """So that a new option cannot be forgotten."""
    numbers = {
        name
        for name, hint in option_types(VLMJobConfig).items()
        if hint in (int, float, float | None, int | None)
    }
    assert numbers == set(vlm_checks.RANGES) | set(checks.RANGES)


@pytest.mark.parametrize(
    ("value", "rule", "allowed"),
    [
        (-1, "-1 or >= 1", True),
        (0, "-1 or >= 1", False),
        (1, "> 0, <= 1", True),
        (1.1, "> 0, <= 1", False),
        (float("nan"), ">= 0", False),
    ],
)
def test_a_rule_is_read_as_it_is_printed(value, rule, allowed):
    assert is_allowed(value, rule) is allowed
