"""What is printed as a table."""


def print_result(result: dict, width: int) -> None:
    metrics = result["metrics"]
    figures = "  ".join(f"{metrics[name]:10.4f}" for name in ("ndcg@10", "recall@100", "map", "mrr@10"))
    counts = f"{result['split']:8}  {result['queries']:8,}  {result['documents']:10,}"
    print(f"{result['dataset']:{width}}  {counts}  {figures}", flush=True)
    for group, means in result.get("groups", {}).items():
        print(f"  {group}: {means['queries']:,} queries, NDCG@10 {means['ndcg@10']:.4f}")
    if number := result["queries_without_hits"]:
        print(
            f"  note: {number:,} queries found nothing and count 0; from a run file, pytrec_eval omits them"
        )
    if number := result["queries_with_ties_beyond_k"]:
        print(f"  note: {number:,} queries tie at rank k with documents beyond the margin: an arbitrary cut")
