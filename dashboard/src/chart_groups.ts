// Which curves stand together. A metric that no row names is shown under "Other".

export interface Group {
  title: string;
  matches: RegExp;
  open?: boolean;
}

export const GROUPS: Group[] = [
  { title: "Training", matches: /^(loss|lr|tokens_per_second|grad_norm)$/, open: true },
  { title: "Evaluation", matches: /^valid\// },
  { title: "Experts of each layer", matches: /^(expert|moe|load_balance|z_loss|router)\w*\// },
  { title: "Mixture of experts", matches: /^(load_balance_loss|z_loss|expert_|moe_|overflow|capacity|mod_)/ },
  { title: "Quantization", matches: /^(quant_|distill|relations)/ },
  { title: "Grokfast and gradients", matches: /^(unfiltered_grad_norm|grad_norm\/|clipped|clamped|num_zeros|params_norm)/ },
  { title: "Learning rate and stability", matches: /^(.*_lr$|lr_|weight_decay|spike|plateau|loss_scale|skipped|max_attention|qk_)/ },
  {
    title: "Speed and memory",
    matches: /^(step_seconds|mfu|goodput|peak_memory|reserved_memory|memory_share|host_memory|disk_share|page_faults|slowest_rank|wait_share)/,
  },
];

const NOT_DRAWN = new Set(["iteration", "tokens", "consumed_samples", "valid/iteration", "valid/tokens"]);

export function grouped(metrics: string[]): { title: string; open: boolean; metrics: string[] }[] {
  const left = new Set(metrics.filter((name) => !NOT_DRAWN.has(name)));
  const found = GROUPS.map(({ title, matches, open }) => {
    const own = [...left].filter((name) => matches.test(name));
    own.forEach((name) => left.delete(name));
    return { title, open: open ?? false, metrics: own };
  });
  found.push({ title: "Other", open: false, metrics: [...left] });
  return found.filter((group) => group.metrics.length > 0);
}
