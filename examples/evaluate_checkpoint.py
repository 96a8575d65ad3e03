"""Did a published checkpoint become better than the model it started from? Win rates with intervals, under two judges.

    python examples/evaluate_checkpoint.py

Needs a GPU with 48 GB: the official SPPO checkpoint of Mistral-7B against its start, with vLLM, on 200 prompts.
`trl-sppo eval` does the same from the command line (docs/evaluation.md).
"""

from trl_sppo.commands.evaluate import EvalArguments, evaluate


def main(**options) -> dict:
    args = EvalArguments(
        **{
            "model_name_or_path": "UCLA-AGI/Mistral7B-PairRM-SPPO-Iter3",
            "opponent_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            # One of the kind that it was trained with, and one of another kind
            "preference_funcs": ["trl_sppo.judges.published.pairrm"],
            "reward_model_name_or_path": ["Skywork/Skywork-Reward-V2-Qwen3-4B"],
            "dataset_name": "trl-lib/ultrafeedback-prompt",
            "max_prompts": 200,
            "num_generations": 2,
            "use_vllm": True,
            "output_dir": "evaluated-checkpoint",
            **options,
        }
    )
    results = evaluate(args)
    for judge, (plain, controlled) in results.items():
        print(f"{judge}: {plain}, at equal length {controlled}")
    return results


if __name__ == "__main__":
    main()
