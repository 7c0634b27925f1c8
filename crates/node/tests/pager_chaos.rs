//! Programs that do anything to their address spaces, in any order, while their pages arrive over connections that
//! break; against a model of what they must see. One seed reproduces one history.

mod pager_rig;

use dunlin_node::pager::{Finish, Observer, Pager, SpaceHandle, SpaceId};
use dunlin_sys::puppet::{Hand, Puppet, SLOTS, pattern};
use pager_rig::*;
use rustix::fd::BorrowedFd;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGES: u64 = 1200;
const SEED: u64 = 11;
const DONTNEED: i32 = 4;
/// Pages that were still elsewhere in the middle of the histories.
static LEFT: AtomicU64 = AtomicU64::new(0);

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }
}

/// What a page must hold: its first and its last word.
type Words = (u64, u64);

#[derive(Clone, Default)]
struct Model(BTreeMap<u64, Words>);

impl Model {
    fn mapped(&self, start: u64, pages: u64) -> bool {
        self.0.range(start..start + pages * PAGE).count() as u64 == pages
    }

    fn any(&self, rng: &mut Rng) -> Option<u64> {
        let n = self.0.len() as u64;
        (n > 0).then(|| *self.0.keys().nth(rng.below(n) as usize).expect("below the length"))
    }
}

#[derive(Default)]
struct Children(Mutex<Vec<SpaceHandle>>);

impl Observer for Children {
    fn forked(&self, _parent: SpaceId, child: &SpaceHandle, _uffd: BorrowedFd<'_>, _journal: BorrowedFd<'_>) {
        self.0.lock().unwrap().push(child.clone());
    }
}

#[test]
fn programs_see_what_they_would_have_seen() {
    // So many histories, and which is the first.
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let first = number("DUNLIN_CHAOS_FIRST").unwrap_or(1);
    for seed in first..first + number("DUNLIN_CHAOS_SEEDS").unwrap_or(12) {
        run(seed);
    }
    // Otherwise all this has shown little.
    assert!(
        LEFT.load(Ordering::Relaxed) > 0,
        "every drain was over before half of its history was"
    );
}

fn run(seed: u64) {
    let rng = &mut Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    // A source where some pages never had content, in several mappings.
    let regions = [(BASE, 700), (BASE + 0x1000_0000, 40), (BASE + 0x2000_0000, PAGES - 740)];
    let source = Puppet::new().unwrap();
    let mut model = Model::default();
    for (start, pages) in regions {
        source.hand(0).map(start, pages * PAGE).unwrap();
        for page in (0..pages).map(|p| start + p * PAGE) {
            let words = if rng.below(5) == 0 {
                (0, 0)
            } else {
                (pattern(SEED, page / 8), pattern(SEED, page / 8 + 511))
            };
            if words.0 != 0 {
                source.hand(0).fill(page, PAGE, SEED, page / 8).unwrap();
            }
            model.0.insert(page, words);
        }
    }
    // Slow enough for most of what follows to happen before all pages are here.
    let holder = Holder::slow(1, Some(Duration::from_micros(300)));
    let (image, unused) = holder.register(&source, &regions);
    let (program, uffd) = watched(&regions);
    let (pager, children) = (Pager::new(), Arc::new(Children::default()));
    let mut space = adopt_with(
        &pager,
        &program,
        uffd,
        map_of(&regions, image),
        &[&holder],
        children.clone(),
        None,
    );
    let mut models = vec![model];
    let mut fresh = BASE + 0x10_0000_0000;
    for step in 0..400 {
        let slot = rng.below(models.len() as u64) as usize;
        let context = format!("seed {seed} step {step} process {slot}");
        if step == 200 {
            LEFT.fetch_add(space.progress().pages_left, Ordering::Relaxed);
        }
        match rng.below(100) {
            0..2 => holder.cut(),
            2 => {
                holder.set_down(true);
                holder.set_down(false);
            }
            3 if models.len() < SLOTS => {
                program.hand(slot).fork(models.len()).expect(&context);
                models.push(models[slot].clone());
            }
            // All threads stand still between commands.
            4 => {
                if let Ok(withdrawn) = space.withdraw() {
                    space = adopt_with(
                        &pager,
                        &program,
                        withdrawn.uffd,
                        withdrawn.map,
                        &[&holder],
                        children.clone(),
                        Some(withdrawn.claims),
                    );
                }
            }
            _ => act(rng, program.hand(slot), &mut models[slot], &mut fresh, &context),
        }
    }
    for (slot, model) in models.iter().enumerate() {
        for (page, words) in &model.0 {
            check(
                program.hand(slot),
                *page,
                *words,
                &format!("seed {seed} end process {slot}"),
            );
        }
    }
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained), "seed {seed}");
    for child in children.0.lock().unwrap().iter() {
        assert_eq!(child.wait_finished(LONG), Some(Finish::Drained), "seed {seed}");
    }
    assert_eq!(unused.recv_timeout(LONG).unwrap(), image);
    // And all of it once more, with nobody watching.
    for (slot, model) in models.iter().enumerate() {
        for (page, words) in &model.0 {
            check(
                program.hand(slot),
                *page,
                *words,
                &format!("seed {seed} after the end process {slot}"),
            );
        }
    }
}

fn act(rng: &mut Rng, hand: Hand<'_>, model: &mut Model, fresh: &mut u64, context: &str) {
    let Some(page) = model.any(rng) else { return };
    let pages = 1 + rng.below(60);
    let end = page + pages * PAGE;
    match rng.below(12) {
        0..4 => check(hand, page, model.0[&page], context),
        4..6 => {
            let word = rng.below(u64::MAX >> 33) + 1;
            hand.poke(page, word).expect(context);
            model.0.get_mut(&page).expect("it is mapped").0 = word;
        }
        6..8 if model.mapped(page, pages) => {
            hand.advise(page, pages * PAGE, DONTNEED).expect(context);
            model.0.range_mut(page..end).for_each(|(_, words)| *words = (0, 0));
        }
        8 => {
            hand.unmap(page, pages * PAGE).expect(context);
            model.0.retain(|at, _| !(page..end).contains(at));
        }
        9 if model.mapped(page, pages) => {
            let to = *fresh;
            *fresh += 0x1000_0000;
            let (grown, keep) = (rng.below(20), rng.below(4) == 0);
            let new = if keep { pages } else { pages + grown };
            // Across several mappings the kernel refuses, and nothing has changed.
            if hand.remap(page, pages * PAGE, new * PAGE, Some(to), keep).is_err() {
                return;
            }
            for i in 0..new {
                let words = model
                    .0
                    .get(&(page + i * PAGE))
                    .copied()
                    .filter(|_| i < pages)
                    .unwrap_or((0, 0));
                model.0.insert(to + i * PAGE, words);
            }
            for i in 0..pages {
                if keep {
                    model.0.insert(page + i * PAGE, (0, 0));
                } else {
                    model.0.remove(&(page + i * PAGE));
                }
            }
        }
        10 if model.mapped(page, pages) => {
            hand.protect(page, pages * PAGE, 1).expect(context);
            check(hand, page, model.0[&page], context);
            hand.protect(page, pages * PAGE, 3).expect(context);
        }
        11 => {
            let at = *fresh;
            *fresh += 0x1000_0000;
            hand.map(at, 4 * PAGE).expect(context);
            model.0.extend((0..4).map(|i| (at + i * PAGE, (0, 0))));
        }
        _ => {}
    }
}

fn check(hand: Hand<'_>, page: u64, words: Words, context: &str) {
    let peek = |at| hand.peek(at).unwrap_or_else(|e| panic!("{context}: {at:#x}: {e}"));
    let seen = (peek(page), peek(page + PAGE - 8));
    assert_eq!(seen, words, "{context}: {page:#x}");
}
