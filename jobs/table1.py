"""The paper's Table I on a Ray cluster: the job that `ray job submit` runs.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/table1.py --presets cifar10 --storage /shared/runs

Everything after `jobs/table1.py` is what `raypp table1` takes. Its runs spread over the cluster that it is submitted to; give
--storage (and data paths) as something that every node sees, because each job runs in a separate folder.
"""  # noqa: E501 (the command stands on one line, to be copied)

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["table1", *sys.argv[1:]])
