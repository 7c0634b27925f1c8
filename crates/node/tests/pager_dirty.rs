//! Writes of a running program are found, and it never waits for that.

mod pager_rig;

use dunlin_node::dirty::{Content, DirtyError, DirtyTracker};
use dunlin_sys::puppet::Puppet;
use dunlin_sys::uffd::Uffd;
use dunlin_sys::vmcopy;
use pager_rig::*;

fn tracker(puppet: &Puppet) -> DirtyTracker {
    let uffd = Uffd::from_fd(puppet.hand(0).userfaultfd().unwrap()).unwrap();
    DirtyTracker::new(uffd, vmcopy::open_pagemap(puppet.pid()).unwrap()).unwrap()
}

/// First page, number of pages, written.
fn short(all: Vec<Content>) -> Vec<(u64, u64, bool)> {
    all.iter()
        .map(|c| ((c.start - BASE) / PAGE, c.pages, c.written))
        .collect()
}

#[test]
fn what_is_written_or_dropped_between_collections_is_found() {
    let puppet = filled(&[(BASE, 100)], 1);
    let hand = puppet.hand(0);
    let region = [(BASE, 100)];
    let mut tracker = tracker(&puppet);
    assert_eq!(short(tracker.collect(&region).unwrap()), [(0, 100, true)]);
    assert_eq!(short(tracker.collect(&region).unwrap()), [(0, 100, false)]);
    hand.poke(BASE + 10 * PAGE, 1).unwrap();
    hand.poke(BASE + 11 * PAGE, 1).unwrap();
    hand.peek(BASE + 12 * PAGE).unwrap();
    // The program does not wait for anybody to read events: there are none.
    hand.advise(BASE + 50 * PAGE, 2 * PAGE, 4).unwrap();
    hand.advise(BASE + 60 * PAGE, PAGE, 4).unwrap();
    hand.poke(BASE + 60 * PAGE, 1).unwrap();
    let expected = [
        (0, 10, false),
        (10, 2, true),
        (12, 38, false),
        (52, 8, false),
        (60, 1, true),
        (61, 39, false),
    ];
    assert_eq!(short(tracker.collect(&region).unwrap()), expected);
    assert_eq!(
        short(tracker.collect(&region).unwrap()),
        [(0, 50, false), (52, 48, false)]
    );
    tracker.disarm();
    hand.poke(BASE, 5).unwrap();
}

#[test]
fn mappings_that_come_go_and_move_are_written() {
    let puppet = filled(&[(BASE, 16), (BASE + 32 * PAGE, 16)], 1);
    let hand = puppet.hand(0);
    let mut tracker = tracker(&puppet);
    let both = [(BASE, 16), (BASE + 32 * PAGE, 16)];
    tracker.collect(&both).unwrap();
    hand.remap(BASE, 16 * PAGE, 16 * PAGE, Some(BASE + 64 * PAGE), false)
        .unwrap();
    let moved = [(BASE + 32 * PAGE, 16), (BASE + 64 * PAGE, 16)];
    assert_eq!(
        short(tracker.collect(&moved).unwrap()),
        [(32, 16, false), (64, 16, true)]
    );
    // Another mapping at the very same place.
    hand.unmap(BASE + 32 * PAGE, 16 * PAGE).unwrap();
    hand.map(BASE + 32 * PAGE, 16 * PAGE).unwrap();
    hand.poke(BASE + 33 * PAGE, 1).unwrap();
    assert_eq!(
        short(tracker.collect(&moved).unwrap()),
        [(33, 1, true), (64, 16, false)]
    );
    assert_eq!(
        short(tracker.collect(&moved).unwrap()),
        [(33, 1, false), (64, 16, false)]
    );
    assert!(matches!(
        tracker.collect(&both),
        Err(DirtyError::Changed { start: BASE, .. })
    ));
    // Regions that were not named are seen for the first time again; a child is not tracked, and not in the way.
    hand.fork(1).unwrap();
    puppet.hand(1).poke(BASE + 33 * PAGE, 2).unwrap();
    assert_eq!(
        short(tracker.collect(&moved).unwrap()),
        [(33, 1, false), (64, 16, true)]
    );
}

#[test]
fn writes_made_during_collections_are_in_one_or_the_next() {
    let pages = 2000;
    let puppet = filled(&[(BASE, pages)], 1);
    let hand = puppet.hand(0);
    let region = [(BASE, pages)];
    let mut tracker = tracker(&puppet);
    let mem = vmcopy::open_mem(puppet.pid()).unwrap();
    let mut copy = vec![0u8; (pages * PAGE) as usize];
    for round in 0..10 {
        std::thread::scope(|scope| {
            scope.spawn(|| hand.fill(BASE, pages * PAGE, 100 + round, 0).unwrap());
            for _ in 0..20 {
                for content in tracker.collect(&region).unwrap().iter().filter(|c| c.written) {
                    let at = (content.start - BASE) as usize;
                    let part = &mut copy[at..at + (content.pages * PAGE) as usize];
                    vmcopy::read(&mem, content.start, part).unwrap();
                }
            }
        });
        for content in tracker.collect(&region).unwrap().iter().filter(|c| c.written) {
            let at = (content.start - BASE) as usize;
            vmcopy::read(&mem, content.start, &mut copy[at..at + (content.pages * PAGE) as usize]).unwrap();
        }
        let mut now = vec![0u8; (pages * PAGE) as usize];
        vmcopy::read(&mem, BASE, &mut now).unwrap();
        assert!(now == copy, "round {round}");
    }
}

#[test]
fn a_space_that_still_drains_is_refused() {
    let (puppet, _uffd) = watched(&[(BASE, 16)]);
    let mut tracker = tracker(&puppet);
    assert!(matches!(
        tracker.collect(&[(BASE, 16)]),
        Err(DirtyError::Draining(BASE))
    ));
}

#[test]
fn reserved_memory_costs_no_page_tables() {
    let puppet = Puppet::new().unwrap();
    let hand = puppet.hand(0);
    let pages = 1 << 26;
    hand.map(BASE, pages * PAGE).unwrap();
    hand.poke(BASE + 77 * PAGE, 1).unwrap();
    let mut tracker = tracker(&puppet);
    assert_eq!(short(tracker.collect(&[(BASE, pages)]).unwrap()), [(77, 1, true)]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", puppet.pid())).unwrap();
    let tables = status.lines().find(|l| l.starts_with("VmPTE")).unwrap();
    let kb: u64 = tables.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kb < 1000, "{tables}");
}
