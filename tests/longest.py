"""The longest test files, which are run first: see tests/conftest.py."""

from __future__ import annotations

LONGEST = (
    "tests/test_pipeline.py",
    "tests/test_sweep.py",
    "tests/test_pipeline_resume.py",
    "tests/test_text_training.py",
    "tests/test_task_runs.py",
    "tests/test_quantizing.py",
    "tests/test_processes.py",
    "tests/deployed/test_strangers.py",
    "tests/deployed/test_texts.py",
    "tests/nets/test_runs.py",
    "tests/test_comparison.py",
    "tests/test_ablation.py",
    "tests/sparsify/test_runs.py",
    "tests/sparsify/test_stages.py",
    "tests/finetune/test_processes.py",
    "tests/test_pipeline_variants.py",
    "tests/test_text_run.py",
    "tests/starts/test_runs.py",
    "tests/test_verify.py",
    "tests/test_sweep_ray.py",
    "tests/test_cli.py",
    "tests/test_diagnose.py",
    "tests/families/test_decoders_onnx.py",
    "tests/families/test_onnx.py",
)
"""Files of half a minute and more: the last one begun late would run beside an idle worker."""
