"""1 to N devices, weak and strong, under every partition: speed, and what the compiled step sends between devices.

    python -m benchmarks.scaling --devices=1,2,4,8 --model=improved_vit_tiny --batch=16

`--batch` is that of one device under weak scaling and that of all devices under strong scaling. On a CPU the devices
are virtual and share its cores, so that there the bytes count and the speed does not. Exit code 1 where a row failed or
a step sends more than it has to: the gradients once and less than one per cent besides (sums of metrics and of batch
statistics); under `fsdp` also the parameters, at most twice.
"""

import json
import sys

from benchmarks import harness
from benchmarks.program_cost import COLLECTIVES, collective_bytes
from vitcls import cli
from vitcls.models import summary


def only_gradients_once(strategy: str, sent: dict[str, int], parameter_bytes: int) -> bool:
    """Whether a step sends what it has to and no more, as the head of this file says."""
    slack = 0.01 * parameter_bytes + 4096
    reduced = sent.get("all-reduce", 0) + sent.get("reduce-scatter", 0)
    gathered = sum(sent.values()) - reduced
    if strategy == "fsdp":
        return 0 < reduced <= parameter_bytes + slack and 0 < gathered <= 2 * parameter_bytes + slack
    return parameter_bytes <= reduced <= parameter_bytes + slack and gathered == 0


def run(devices: int, strategy: str, kind: str, model: str, batch: int, dtype: str, repeats: int, overrides) -> dict:
    """Measures one row in this process, which sees `devices` devices."""
    import jax

    from benchmarks import workload
    from vitcls.core import sharding

    assert jax.device_count() == devices
    global_batch = batch * devices if kind == "weak" else batch
    overrides = (*overrides, f"partition.strategy={strategy}", "steps_per_call=1")
    config = workload.make_config(model, global_batch, dtype=dtype, overrides=overrides)
    info = workload.make_info(model)
    partition = sharding.all_devices(strategy, min_shard_elements=config.partition.min_shard_elements)
    partition.check_batch_size(global_batch)
    trainer = workload.Trainer(config, info, partition, workload.random_resident(partition, info, global_batch))
    sent = collective_bytes(trainer.compiled.as_text()) if devices > 1 else {}  # one device reduces over itself
    parameters = jax.eval_shape(trainer.training.create_state, jax.random.key(0)).params
    parameter_bytes = summary.count_bytes(parameters)
    timing = harness.measure(trainer, repeats=repeats)
    return {
        "batch": global_batch,
        "images/s": global_batch / timing.median,
        "step ms": 1e3 * timing.median,
        "fastest..slowest": timing.spread(),
        "parameters MB": parameter_bytes / 1e6,
        **{f"{collective} MB": sent.get(collective, 0) / 1e6 for collective in COLLECTIVES[:3]},
        "other MB": sum(sent.get(collective, 0) for collective in COLLECTIVES[3:]) / 1e6,
        "gradients once": devices == 1 or only_gradients_once(strategy, sent, parameter_bytes),
    }


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__)
    flags.add_argument("--devices", type=harness.integers, default="1,2,4,8", help="numbers of devices")
    flags.add_argument("--strategies", default="data,fsdp,pmap")
    flags.add_argument("--kinds", default="weak,strong")
    flags.add_argument("--model", default="improved_vit_tiny")
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--override", action="append", default=[], help="config key=value")
    flags.add_argument("--job", help="for the child process")
    args = flags.parse_args(argv)
    if args.job:
        print(json.dumps({"row": run(**json.loads(args.job)), "about": harness.machine()}))
        return 0

    rows, about, alone = [], None, {}
    for kind in args.kinds.split(","):
        for strategy in args.strategies.split(","):
            for devices in args.devices:
                job = dict(devices=devices, strategy=strategy, kind=kind, model=args.model, batch=args.batch)
                job |= dict(dtype=args.dtype, repeats=args.repeats, overrides=args.override)
                visible = {
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))),
                }
                result = harness.in_child("benchmarks.scaling", ["--job", json.dumps(job)], environment=visible)
                row = {"scaling": kind, "partition": strategy, "devices": devices}
                row |= result.get("row") or {"error": result["error"]}
                about = result.get("about") or about
                speed = row.get("images/s")
                alone.setdefault((kind, strategy), speed if devices == 1 else None)
                if speed and alone[kind, strategy]:
                    row["efficiency %"] = 100 * speed / alone[kind, strategy] / devices
                print(f"  {row}", file=sys.stderr)
                rows.append(row)
    harness.publish("scaling", rows, args.out, about=about or {"run": harness.RUN})
    return int(not all(row.get("gradients once") for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
