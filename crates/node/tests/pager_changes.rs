//! The program changes its address space while pages are away: it must see what it would have seen without the move.

mod pager_rig;

use dunlin_node::pager::{Finish, Observer, Pager, SpaceHandle, SpaceId};
use dunlin_sys::puppet::pattern;
use pager_rig::*;
use rustix::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

const REGION: [(u64, u64); 1] = [(BASE, 600)];

/// A program whose 600 pages are all away and stay so until the holder is let up.
struct Stage {
    _source: dunlin_sys::puppet::Puppet,
    holder: Holder,
    program: dunlin_sys::puppet::Puppet,
    space: SpaceHandle,
    observed: Arc<Observed>,
    unused: std::sync::mpsc::Receiver<dunlin_proto::ids::ImageId>,
    pager: Pager,
}

#[derive(Default)]
struct Observed {
    children: Mutex<Vec<SpaceHandle>>,
    finished: Mutex<Vec<(SpaceId, Finish)>>,
}

impl Observer for Observed {
    fn forked(&self, _parent: SpaceId, child: &SpaceHandle, _uffd: BorrowedFd<'_>, _journal: BorrowedFd<'_>) {
        self.children.lock().unwrap().push(child.clone());
    }

    fn finished(&self, space: SpaceId, how: Finish) {
        self.finished.lock().unwrap().push((space, how));
    }
}

fn stage() -> Stage {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    holder.set_down(true);
    let (image, unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let (pager, observed) = (Pager::new(), Arc::new(Observed::default()));
    let space = adopt_with(
        &pager,
        &program,
        uffd,
        map_of(&REGION, image),
        &[&holder],
        observed.clone(),
        None,
    );
    Stage {
        _source: source,
        holder,
        program,
        space,
        observed,
        unused,
        pager,
    }
}

impl Stage {
    /// Lets the pages come, and waits until all is over and the image released.
    fn drain(&self) {
        self.holder.set_down(false);
        assert_eq!(self.space.wait_finished(LONG), Some(Finish::Drained));
        for child in self.observed.children.lock().unwrap().iter() {
            assert!(child.wait_finished(LONG).is_some());
        }
        self.unused.recv_timeout(LONG).unwrap();
        assert!(self.pager.spaces().is_empty());
    }

    fn expect(&self, slot: usize, at: u64, pages: u64, first_page: u64) {
        let wrong = self
            .program
            .hand(slot)
            .verify(at, pages * PAGE, 5, first_page * 512)
            .unwrap();
        assert_eq!(wrong, None, "in process {slot} from {at:#x}");
    }

    fn expect_zeros(&self, slot: usize, at: u64, pages: u64) {
        for page in 0..pages {
            let address = at + page * PAGE;
            assert_eq!(
                self.program.hand(slot).peek(address).unwrap(),
                0,
                "in process {slot} at {address:#x}"
            );
        }
    }
}

#[test]
fn dropped_pages_are_zeros_and_no_stale_page_comes_back() {
    let stage = stage();
    let hand = stage.program.hand(0);
    hand.advise(BASE + 100 * PAGE, 50 * PAGE, libc_madv::DONTNEED).unwrap();
    hand.poke(BASE + 120 * PAGE, 77).unwrap();
    stage.holder.set_down(false);
    stage.expect(0, BASE, 100, 0);
    assert_eq!(hand.peek(BASE + 120 * PAGE).unwrap(), 77);
    stage.expect_zeros(0, BASE + 100 * PAGE, 20);
    stage.expect_zeros(0, BASE + 121 * PAGE, 29);
    stage.expect(0, BASE + 150 * PAGE, 450, 150);
    stage.drain();
    assert_eq!(hand.peek(BASE + 120 * PAGE).unwrap(), 77);
    stage.expect_zeros(0, BASE + 121 * PAGE, 29);
}

#[test]
fn dropping_pages_in_a_hurry_while_they_arrive() {
    for round in 0..20 {
        let stage = stage();
        let hand = stage.program.hand(0);
        stage.holder.set_down(false);
        // Whatever is in flight at the moment, after the call the page is zeros for good.
        for page in 0..600 {
            let page = page * 7 % 600;
            if page % 3 == round % 3 {
                hand.advise(BASE + page * PAGE, PAGE, libc_madv::DONTNEED).unwrap();
                assert_eq!(hand.peek(BASE + page * PAGE).unwrap(), 0, "round {round} page {page}");
            }
        }
        for page in 0..600 {
            let expected = if page % 3 == round % 3 {
                0
            } else {
                pattern(5, page * 512)
            };
            assert_eq!(
                hand.peek(BASE + page * PAGE).unwrap(),
                expected,
                "round {round} page {page}"
            );
        }
        stage.drain();
    }
}

#[test]
fn unmapped_pages_never_come_and_what_is_mapped_there_next_is_new() {
    let stage = stage();
    let hand = stage.program.hand(0);
    hand.unmap(BASE + 200 * PAGE, 100 * PAGE).unwrap();
    hand.map(BASE + 250 * PAGE, 10 * PAGE).unwrap();
    hand.poke(BASE + 251 * PAGE, 9).unwrap();
    stage.holder.set_down(false);
    stage.expect(0, BASE, 200, 0);
    stage.expect(0, BASE + 300 * PAGE, 300, 300);
    stage.drain();
    assert_eq!(hand.peek(BASE + 251 * PAGE).unwrap(), 9);
    stage.expect_zeros(0, BASE + 252 * PAGE, 8);
    let progress = stage.space.progress();
    assert_eq!(progress.pages_faulted + progress.pages_pushed, 500);
}

#[test]
fn moved_and_grown_mappings_keep_their_pages() {
    let stage = stage();
    let hand = stage.program.hand(0);
    let to = BASE + 0x4000_0000;
    // The middle moves and grows; then it moves again, and a part is cut off.
    hand.remap(BASE + 100 * PAGE, 200 * PAGE, 300 * PAGE, Some(to), false)
        .unwrap();
    let further = to + 0x4000_0000;
    hand.remap(to, 300 * PAGE, 250 * PAGE, Some(further), false).unwrap();
    stage.holder.set_down(false);
    stage.expect(0, further, 200, 100);
    stage.expect_zeros(0, further + 200 * PAGE, 50);
    stage.expect(0, BASE, 100, 0);
    stage.expect(0, BASE + 300 * PAGE, 300, 300);
    stage.drain();
    stage.expect(0, further, 200, 100);
}

#[test]
fn a_mapping_moved_while_the_old_one_stays() {
    let stage = stage();
    let hand = stage.program.hand(0);
    let to = BASE + 0x4000_0000;
    hand.remap(BASE, 600 * PAGE, 600 * PAGE, Some(to), true).unwrap();
    stage.holder.set_down(false);
    stage.expect_zeros(0, BASE, 600);
    stage.expect(0, to, 600, 0);
    stage.drain();
}

#[test]
fn moving_mappings_in_a_hurry_while_pages_arrive() {
    let stage = stage();
    let hand = stage.program.hand(0);
    stage.holder.set_down(false);
    let mut at = BASE;
    for round in 1..100 {
        let to = BASE + round * 0x4000_0000;
        hand.remap(at, 600 * PAGE, 600 * PAGE, Some(to), false).unwrap();
        assert_eq!(
            hand.peek(to + (round * 6 % 600) * PAGE).unwrap(),
            pattern(5, round * 6 % 600 * 512)
        );
        at = to;
    }
    stage.expect(0, at, 600, 0);
    stage.drain();
}

#[test]
fn children_and_grandchildren_get_the_same_pages() {
    let stage = stage();
    stage.program.hand(0).fork(1).unwrap();
    stage.program.hand(1).fork(2).unwrap();
    stage
        .program
        .hand(1)
        .advise(BASE, 10 * PAGE, libc_madv::DONTNEED)
        .unwrap();
    stage.program.hand(2).unmap(BASE + 10 * PAGE, 10 * PAGE).unwrap();
    assert_eq!(stage.observed.children.lock().unwrap().len(), 2);
    stage.holder.set_down(false);
    stage.expect(2, BASE, 10, 0);
    stage.expect(2, BASE + 20 * PAGE, 580, 20);
    stage.expect_zeros(1, BASE, 10);
    stage.expect(1, BASE + 10 * PAGE, 590, 10);
    stage.expect(0, BASE, 600, 0);
    stage.drain();
    let finished = stage.observed.finished.lock().unwrap();
    assert_eq!(finished.len(), 3);
    assert!(finished.iter().all(|(_, how)| *how == Finish::Drained));
    // Nothing was asked for twice: what arrived was put where it was missing.
    assert!(stage.holder.store.status().is_empty());
}

#[test]
fn forking_in_a_hurry_while_pages_arrive() {
    for round in 0..10 {
        let stage = stage();
        stage.holder.set_down(false);
        for slot in 1..6usize {
            stage
                .program
                .hand(0)
                .peek(BASE + (slot as u64 * 97 + round) % 600 * PAGE)
                .unwrap();
            stage.program.hand(slot.saturating_sub(3)).fork(slot).unwrap();
        }
        for slot in (0..6).rev() {
            stage.expect(slot, BASE, 600, 0);
        }
        stage.drain();
    }
}

#[test]
fn a_child_that_exits_and_one_that_executes_are_let_go() {
    let stage = stage();
    stage.program.hand(0).fork(1).unwrap();
    stage.program.hand(0).fork(2).unwrap();
    stage.program.hand(1).exit().unwrap();
    stage.program.hand(2).exec().unwrap();
    let children = stage.observed.children.lock().unwrap().clone();
    // The holder is still out of reach: this is noticed without it.
    for child in &children {
        assert_eq!(child.wait_finished(LONG), Some(Finish::Gone));
    }
    stage.holder.set_down(false);
    stage.expect(0, BASE, 600, 0);
    stage.drain();
}

#[test]
fn a_program_that_ends_lets_its_image_go() {
    let stage = stage();
    stage.program.hand(0).exit().unwrap();
    assert_eq!(stage.space.wait_finished(LONG), Some(Finish::Gone));
    stage.holder.set_down(false);
    stage.unused.recv_timeout(LONG).unwrap();
}

#[test]
fn protections_do_not_keep_pages_away() {
    let stage = stage();
    let hand = stage.program.hand(0);
    // Mappings are cut where protections change: copies must not cross such a border.
    for page in (0..600).step_by(10) {
        hand.protect(BASE + page * PAGE, 3 * PAGE, 0).unwrap();
        hand.protect(BASE + (page + 5) * PAGE, 2 * PAGE, 1).unwrap();
    }
    stage.holder.set_down(false);
    assert_eq!(stage.space.wait_finished(LONG), Some(Finish::Drained));
    hand.protect(BASE, 600 * PAGE, 3).unwrap();
    stage.expect(0, BASE, 600, 0);
    let progress = stage.space.progress();
    assert_eq!((progress.pages_faulted, progress.pages_pushed), (0, 600));
}

#[test]
fn threads_that_wait_for_the_same_page_all_wake() {
    let stage = stage();
    let holder = &stage.holder;
    std::thread::scope(|scope| {
        let threads = scope.spawn(|| {
            stage
                .program
                .hand(0)
                .threads(16, BASE + 300 * PAGE, pattern(5, 300 * 512))
        });
        // Let some of them wait first.
        while stage.space.progress().trouble.is_none() {
            std::thread::yield_now();
        }
        holder.set_down(false);
        assert_eq!(threads.join().unwrap().unwrap(), 16);
    });
    stage.drain();
}

#[test]
fn guard_pages_that_came_with_the_move_stay_guards() {
    const GUARD_INSTALL: i32 = 102;
    let source = filled(&REGION, 5);
    if source.hand(0).advise(BASE + 50 * PAGE, PAGE, GUARD_INSTALL).is_err() {
        eprintln!("skipped: this kernel has no guard pages (Linux 6.13 has)");
        return;
    }
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    program.hand(0).advise(BASE + 50 * PAGE, PAGE, GUARD_INSTALL).unwrap();
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    let hand = program.hand(0);
    assert_eq!(hand.verify(BASE, 50 * PAGE, 5, 0).unwrap(), None);
    assert_eq!(hand.verify(BASE + 51 * PAGE, 549 * PAGE, 5, 51 * 512).unwrap(), None);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    // The access kills the program.
    assert!(hand.peek(BASE + 50 * PAGE).is_err());
}

#[test]
fn a_forked_child_is_found_by_its_pid() {
    let stage = stage();
    let pids: Vec<i32> = (1..4).map(|slot| stage.program.hand(0).fork(slot).unwrap()).collect();
    let children = stage.observed.children.lock().unwrap().clone();
    assert!(children.iter().all(|c| c.pid().is_none()));
    assert_eq!(
        stage.pager.space_of(stage.program.pid(), LONG).unwrap().id(),
        stage.space.id()
    );
    // Nothing arrives, so nothing can be told apart.
    assert!(
        stage
            .pager
            .space_of(pids[0], std::time::Duration::from_millis(1))
            .is_none()
    );
    let pager = stage.pager.clone();
    std::thread::scope(|scope| {
        let wanted: Vec<_> = pids
            .iter()
            .map(|pid| scope.spawn(|| pager.space_of(*pid, LONG)))
            .collect();
        // Let them ask before everything is over.
        std::thread::sleep(std::time::Duration::from_millis(50));
        stage.holder.set_down(false);
        for (thread, child) in wanted.into_iter().zip(&children) {
            let found = thread.join().unwrap().expect("it is one of them");
            assert_eq!(found.id(), child.id());
        }
    });
    stage.drain();
    assert!(stage.pager.space_of(pids[0], LONG).is_none());
}

#[test]
fn an_executed_program_is_not_withdrawn() {
    let stage = stage();
    stage.program.hand(0).exec().unwrap();
    assert_eq!(stage.space.withdraw().err(), Some(Finish::Gone));
}

#[test]
fn what_grew_unseen_is_unwatched_though_somebody_holds_the_descriptor() {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let second = uffd.try_clone().unwrap();
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    program
        .hand(0)
        .remap(BASE, 600 * PAGE, 700 * PAGE, None, false)
        .unwrap();
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    assert_eq!(program.hand(0).peek(BASE + 650 * PAGE).unwrap(), 0);
    drop(second);
}

#[test]
fn an_image_that_nothing_is_wanted_from_is_released() {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let mut map = map_of(&REGION, image);
    // Everything came with the essence.
    map.settle(BASE, 600);
    let space = adopt(&Pager::new(), &program, uffd, map, &[&holder]);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    assert_eq!(unused.recv_timeout(LONG).unwrap(), image);
}

/// Numbers of madvise(2).
mod libc_madv {
    pub const DONTNEED: i32 = 4;
}
