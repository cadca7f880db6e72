// Drawing shared out over frames: each does as much as fits in a few milliseconds, so that many charts do not hold up
// what the user does. What is asked for twice is done once, and nothing is drawn while the page is out of sight.
const BUDGET_MS = 8;
const waiting = new Map<object, () => void>();
let asked = false;

/** Calls `task` in one of the next frames, in place of the task that waits for `what`. */
export function soon(what: object, task: () => void) {
  waiting.set(what, task);
  if (!asked) requestAnimationFrame(frame);
  asked = true;
}

export function notAnyMore(what: object) {
  waiting.delete(what);
}

async function frame() {
  const end = performance.now() + BUDGET_MS;
  try {
    for (const [what, task] of waiting) {
      if (performance.now() > end) break;
      waiting.delete(what);
      task();
      await null; // uPlot draws in a microtask, which comes before this one's rest
    }
  } finally {
    asked = waiting.size > 0; // also where one failed: the console has it, and the others are drawn
    if (asked) requestAnimationFrame(frame);
  }
}
