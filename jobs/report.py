"""One page about runs, bundles and attacks, made on a Ray cluster: the job that `ray job submit` runs.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/report.py /shared/runs/first/bundle --output /shared/report

Everything after `jobs/report.py` is what `raypp report` takes. It needs no cluster; it is a job where only the cluster sees
the storage.
"""  # noqa: E501 (the command stands on one line, to be copied)

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["report", *sys.argv[1:]])
