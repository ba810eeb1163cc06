"""Publish a bundle in a model repository: the job that `ray job submit` runs where only the cluster sees the storage.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/publish.py /shared/runs/first /shared/models

Everything after `jobs/publish.py` is what `raypp publish` takes. Services of the repository switch to the bundle.
`jobs/train.py ... --publish /shared/models` does the same at the end of a training.
"""  # noqa: E501 (the command stands on one line, to be copied)

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["publish", *sys.argv[1:]])
