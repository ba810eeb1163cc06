"""Train on a Ray cluster: the job that `ray job submit` runs.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/train.py quickstart --storage /shared/runs

Everything after `jobs/train.py` is what `raypp train` takes. The job uses the cluster that it is submitted to; give
--storage (and data paths) as something that every node sees, because each job runs in a separate folder.
"""  # noqa: E501 (the command stands on one line, to be copied)

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["train", *sys.argv[1:]])
