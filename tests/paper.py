"""
What the paper's numbers are made of, simulated: from the baseline to the optimised run technique by technique, its
predecessor's bubbles, plans near the paper's that it does not use, fewer layers, and its shape among others under its
own cut.

    python tests/paper.py            # some minutes: most of it for the shapes
"""
import argparse
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sim  # noqa: E402
from published import GroupedShape, GroupedWork  # noqa: E402
from sim import PANGU, Plan, predict  # noqa: E402

HARDWARE = sim.HARDWARE[sim.PAPER_BINS[0]]
# Pangu Ultra, 135B dense, the paper's predecessor (arXiv:2504.07866)
PANGU_ULTRA = GroupedShape(
    vocab_size=153376, max_position_embeddings=131072, hidden_size=12288, num_hidden_layers=94,
    first_k_dense_replace=94, intermediate_size=28672, num_attention_heads=96, attn_type="gqa", num_key_value_heads=8,
    head_dim=128, q_lora_rank=0, kv_lora_rank=0, norm="dssn", n_routed_experts=1, n_shared_experts=0,
    num_experts_per_tok=1, num_nextn_predict_layers=0, balance="none")
ULTRA_PLAN = Plan(tp=8, sp=1, pp=8, dp=128, micro_batch=1, global_batch=2048, seq_len=4096)
ULTRA_BUBBLES = {1: "30.45 %", 6: "6.8 %"}                 # vpp -> as published: (p - 1) / (p - 1 + v * n)
OPTIMISED = Plan(seq_len=sim.PAPER_LENGTH, **sim.PAPER["optimised"]["plan"])
# technique -> what it changes, each on top of those above it
LADDER = {"baseline": {}, "hierarchical exchange": dict(dispatch="hierarchical"),
          "adaptive overlap": dict(overlap="adaptive", schedule=""),
          "MLA, activation, permutation recomputed, not all": dict(recompute=sim.FINE),
          "load balance": dict(max_vio=0.0),
          "6,144 NPUs": dict(dp=48, global_batch=48 * 2 * 48)}
PUBLISHED = {"baseline": "148.9", "load balance": "+10 % of MFU", "6,144 NPUs": "237.6, x 1.596"}
PLAYED = 40                        # neighbours of the plan that are played in full


def climb_ladder():
    """list of predictions, one for each technique of LADDER."""
    changes, results = dict(seq_len=sim.PAPER_LENGTH), []
    for change in LADDER.values():
        changes |= change
        results.append(sim.simulate_paper("baseline", HARDWARE, **changes))
    return results


def print_ladder():
    print(f"From the baseline to the optimised run, {HARDWARE.name} at {sim.PAPER_LENGTH}\n"
          "                                                   | published        | simulated\n"
          "technique                                          | tokens/s/NPU     | tokens/s/NPU   gain   in all")
    rates = [result["tokens_per_s_per_device"] for result in climb_ladder()]
    for name, rate, before in zip(LADDER, rates, [rates[0], *rates]):
        print(f"{name:50} | {PUBLISHED.get(name, ''):16} | {rate:12.1f} {rate / before:6.3f} {rate / rates[0]:8.3f}")


def simulate_predecessor(vpp):
    return predict(PANGU_ULTRA, replace(ULTRA_PLAN, vpp=vpp, schedule=""), HARDWARE, work=GroupedWork)


def print_predecessor():
    print(f"\nPangu Ultra 135B, dense, on 8192 {HARDWARE.name}, 2048 sequences of 4096 (published: arXiv:2504.07866)\n"
          "vpp | published: bubble | simulated: bubble     MFU   step s")
    for vpp, published in ULTRA_BUBBLES.items():
        print(f"{vpp:3} | {published:>17} |",
              "          {bubble:7.1%} {mfu:7.1%} {step_time_s:8.2f}".format(**simulate_predecessor(vpp)))


def best_neighbour():
    """The fastest of the plans with another schedule, expert group, cut over stages or exchange than the paper's."""
    priced = []
    for ep in 32, 64:
        group = []
        for pp in 8, 12, 16:
            for schedule, vpp in sim.SEARCHED:
                group.append(replace(
                    OPTIMISED, schedule=schedule, vpp=vpp, ep=ep, pp=pp, dp=OPTIMISED.dp * OPTIMISED.pp // pp,
                    overlap="adaptive" if schedule == "paired" else "none"))
        priced += sim.price_group(PANGU, HARDWARE, group)[0]
    priced.sort(key=itemgetter(0))
    results = [predict(PANGU, plan, HARDWARE) for _, plan in priced[:PLAYED]]
    return min(results, key=itemgetter("step_time_s"))


def print_neighbour():
    result = best_neighbour()
    print("\nNot used by the paper, found near its plan, balanced (simulated; `sim.py plans` searches all): "
          f"{result['tokens_per_s_per_device']:.1f} tokens/s/NPU,\n{sim.describe(result['plan'])}")


def print_fewer_layers():
    rates = [predict(shape, OPTIMISED, HARDWARE)["tokens_per_s"]
             for shape in (PANGU, replace(PANGU, num_hidden_layers=66))]
    print("\nThroughput of 61 layers over 66, under the optimised run's plan and else alike: published +15 %, "
          f"simulated {rates[0] / rates[1] - 1:+.1%}")


def print_own_cut(shapes):
    """The paper's shape beside others, all under its own cut, and by depth alone."""
    rates = {}                                             # shape -> tokens/s, of those that fit
    for config in sim.with_progress("shapes under the paper's cut", shapes):
        result = sim.fastest(config, [OPTIMISED], HARDWARE)
        if result:
            rates[config] = result["tokens_per_s"]
    faster = [config for config, rate in rates.items() if rate > rates[PANGU]]
    alike = [config for config in faster if config.moe_intermediate_size == PANGU.moe_intermediate_size]
    print(f"\nUnder its own cut, pp=16 vpp=2 ep=32, Pangu Ultra MoE is number {len(faster) + 1} of {len(rates)}, and "
          f"number {len(alike) + 1} of those\nwith experts as wide as its own. By depth alone, 61 layers are the most "
          "before a stage grows:")
    for layers in (58, 60, 61, 62, 64, 66):
        result = sim.fastest(replace(PANGU, num_hidden_layers=layers), [OPTIMISED], HARDWARE)
        if result:
            print(f"{layers} layers {result['tokens_per_s']:.3g} tokens/s")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print_ladder()
    print_predecessor()
    print_neighbour()
    print_fewer_layers()
    budget = sim.parse_budget("active=39e9,total=718e9")
    print_own_cut([config for config, _, _ in sim.candidate_shapes(budget)
                   if config.n_routed_experts == PANGU.n_routed_experts])


if __name__ == "__main__":
    main()
