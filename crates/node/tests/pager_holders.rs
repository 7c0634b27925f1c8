//! Holders out of reach, several holders, and spaces that move on while they drain.

mod pager_rig;

use dunlin_cluster::page_map::PageMap;
use dunlin_node::pager::{Finish, Pager};
use dunlin_sys::puppet::{Puppet, pattern};
use pager_rig::*;
use std::sync::Arc;

const PAGES: u64 = 6000;
const REGION: [(u64, u64); 1] = [(BASE, PAGES)];

#[test]
fn broken_connections_are_made_again_and_the_program_only_waits() {
    // Enough for some of it to be missing still after each break.
    const PAGES: u64 = 40_000;
    const REGION: [(u64, u64); 1] = [(BASE, PAGES)];
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    program.hand(0).start_verify(BASE, PAGES * PAGE, 5, 0).unwrap();
    let mut breaks = 0;
    while space.progress().finished.is_none() {
        let before = space.progress();
        let connects = || holder.connects.load(std::sync::atomic::Ordering::Relaxed);
        let tried = connects();
        holder.set_down(breaks % 3 == 0);
        holder.cut();
        breaks += 1;
        // Down until it has been tried again; then up until something has come.
        while connects() == tried && space.progress().finished.is_none() {
            std::thread::yield_now();
        }
        holder.set_down(false);
        while space.progress().pages_left == before.pages_left && space.progress().finished.is_none() {
            std::thread::yield_now();
        }
    }
    assert!(breaks >= 2, "all came before anything broke: {breaks}");
    assert_eq!(program.hand(0).finish().unwrap(), -1);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    assert_eq!(unused.recv_timeout(LONG).unwrap(), image);
    let progress = space.progress();
    assert_eq!(progress.pages_faulted + progress.pages_pushed, PAGES);
}

#[test]
fn an_unknown_image_is_waited_for() {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &REGION);
    assert!(holder.store.remove(image));
    let (program, uffd) = watched(&REGION);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    program.hand(0).start_peek(BASE).unwrap();
    while space.progress().trouble.is_none() {
        std::thread::yield_now();
    }
    assert!(!space.progress().attached);
    assert_eq!(space.pages_elsewhere()[&image], PAGES);
}

#[test]
fn one_map_with_several_images() {
    let (odd, even) = (filled(&REGION, 1), filled(&REGION, 2));
    let (first, second) = (Holder::new(1), Holder::new(2));
    let (image1, unused1) = first.register(&odd, &REGION);
    let (image2, unused2) = second.register(&even, &REGION);
    let (program, uffd) = watched(&REGION);
    let mut map = PageMap::new();
    map.add_region(BASE, PAGES).unwrap();
    for page in (1..PAGES).step_by(2) {
        map.back_with(BASE + page * PAGE, 1, image1, BASE + page * PAGE)
            .unwrap();
    }
    map.back_with(BASE, PAGES / 2, image2, BASE).unwrap();
    map.back_with(BASE + PAGES / 2 * PAGE, PAGES / 2, image2, BASE + PAGES / 2 * PAGE)
        .unwrap();
    // One holder is out of reach for a while: the other's pages come all the same.
    first.set_down(true);
    let space = adopt(&Pager::new(), &program, uffd, map, &[&first, &second]);
    let hand = program.hand(0);
    for page in (0..PAGES).step_by(2) {
        assert_eq!(hand.peek(BASE + page * PAGE).unwrap(), pattern(2, page * 512));
    }
    unused2.recv_timeout(LONG).unwrap();
    assert_eq!(space.pages_elsewhere()[&image1], PAGES / 2);
    first.set_down(false);
    for page in (1..PAGES).step_by(2) {
        assert_eq!(hand.peek(BASE + page * PAGE).unwrap(), pattern(1, page * 512));
    }
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    unused1.recv_timeout(LONG).unwrap();
}

/// Waits until at least so many pages have come.
fn wait_for_pages(space: &dunlin_node::pager::SpaceHandle, pages: u64) {
    while space.progress().pages_left + pages > PAGES {
        std::thread::yield_now();
    }
}

#[test]
fn a_space_moves_on_while_it_drains_and_fetches_from_both_holders() {
    let source = filled(&REGION, 5);
    let (first, second) = (Holder::new(1), Holder::new(2));
    let (image1, unused1) = first.register(&source, &REGION);
    let (middle, uffd) = watched(&REGION);
    let space = adopt(&Pager::new(), &middle, uffd, map_of(&REGION, image1), &[&first]);
    // It runs for a while: some pages come, some are changed, some dropped, some have moved.
    let hand = middle.hand(0);
    let to = BASE + 0x4000_0000;
    hand.remap(BASE + 1000 * PAGE, 1000 * PAGE, 1000 * PAGE, Some(to), false)
        .unwrap();
    hand.poke(BASE + 5 * PAGE, 99).unwrap();
    hand.advise(BASE + 6 * PAGE, PAGE, 4).unwrap();
    hand.poke(to + 7 * PAGE, 98).unwrap();
    wait_for_pages(&space, 200);
    first.set_down(true);
    // All its threads are stopped now: the puppet does nothing unless told.
    let withdrawn = space.withdraw().unwrap();
    assert_eq!(space.wait_finished(LONG), Some(Finish::Withdrawn));
    let left: u64 = withdrawn.map.pages_away();

    // Its second node becomes a holder of what it has; the rest is still with the first.
    let regions: Vec<(u64, u64)> = withdrawn.map.regions().collect();
    let (image2, unused2) = second.register(&middle, &regions);
    let mut map = PageMap::from_image(&withdrawn.map.to_image()).unwrap();
    assert_eq!(map.pages_away(), left);
    for (start, pages) in &regions {
        map.back_with(*start, *pages, image2, *start).unwrap();
    }
    let (last, uffd) = watched(&regions);
    first.set_down(false);
    let space = adopt(&Pager::new(), &last, uffd, map, &[&first, &second]);
    assert!(space.wait_attached(LONG));
    drop(withdrawn.claims);
    let hand = last.hand(0);
    assert_eq!(hand.peek(BASE + 5 * PAGE).unwrap(), 99);
    assert_eq!(hand.peek(BASE + 6 * PAGE).unwrap(), 0);
    assert_eq!(hand.peek(to + 7 * PAGE).unwrap(), 98);
    hand.poke(BASE + 5 * PAGE, pattern(5, 5 * 512)).unwrap();
    hand.poke(to + 7 * PAGE, pattern(5, 1007 * 512)).unwrap();
    for (at, first_page, pages) in [
        (BASE, 0, 6),
        (BASE + 7 * PAGE, 7, 993),
        (BASE + 2000 * PAGE, 2000, PAGES - 2000),
    ] {
        assert_eq!(hand.verify(at, pages * PAGE, 5, first_page * 512).unwrap(), None);
    }
    assert_eq!(hand.verify(to, 1000 * PAGE, 5, 1000 * 512).unwrap(), None);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    unused1.recv_timeout(LONG).unwrap();
    unused2.recv_timeout(LONG).unwrap();
    assert!(
        left > 0,
        "the source was cut off too late for this test to show anything"
    );
}

#[test]
fn a_failed_further_move_goes_on_where_it_was() {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let pager = Pager::new();
    let mut space = adopt(&pager, &program, uffd, map_of(&REGION, image), &[&holder]);
    for round in 1..6 {
        wait_for_pages(&space, round * 300);
        let Ok(withdrawn) = space.withdraw() else { break };
        assert_eq!(pager.spaces().len(), 0);
        space = adopt_with(
            &pager,
            &program,
            withdrawn.uffd,
            withdrawn.map,
            &[&holder],
            Arc::new(()),
            Some(withdrawn.claims),
        );
    }
    assert_eq!(program.hand(0).verify(BASE, PAGES * PAGE, 5, 0).unwrap(), None);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    unused.recv_timeout(LONG).unwrap();
}

#[test]
fn nothing_is_installed_after_a_withdrawal() {
    let source = filled(&REGION, 5);
    let holder = Holder::new(1);
    let (image, unused) = holder.register(&source, &REGION);
    let (program, uffd) = watched(&REGION);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    wait_for_pages(&space, 100);
    let withdrawn = space.withdraw().unwrap();
    let pagemap = dunlin_sys::vmcopy::open_pagemap(program.pid()).unwrap();
    let here = || {
        let pages = (0..PAGES).step_by(64).flat_map(|page| {
            let count = (PAGES - page).min(64) as usize;
            dunlin_sys::pagemap::entries(&pagemap, BASE + page * PAGE, count)
                .unwrap()
                .map(|e| e.has_content())
        });
        pages.collect::<Vec<bool>>()
    };
    let before = here();
    for (page, here) in before.iter().enumerate() {
        let place = withdrawn.map.lookup(BASE + page as u64 * PAGE);
        assert_eq!(*here, place == dunlin_cluster::page_map::Place::NotAway, "page {page}");
    }
    // The claims hold the image though nobody drains it; dropping them lets it go.
    assert!(unused.try_recv().is_err());
    drop(withdrawn.claims);
    unused.recv_timeout(LONG).unwrap();
    assert_eq!(here(), before);
    assert!(space.withdraw().is_err());
}

#[test]
fn a_sweep_finds_its_pages_there() {
    let pages = 40_000;
    let region = [(BASE, pages)];
    let source = filled(&region, 5);
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &region);
    let (program, uffd) = watched(&region);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&region, image), &[&holder]);
    assert_eq!(program.hand(0).verify(BASE, pages * PAGE, 5, 0).unwrap(), None);
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    let progress = space.progress();
    let avoided = 1.0 - progress.pages_faulted as f64 / pages as f64;
    eprintln!("{avoided} {progress:?}");
    assert!(avoided >= 0.97, "{progress:?}");
}

#[test]
fn a_source_that_cannot_be_read_gives_nothing_rather_than_zeros() {
    let mut source = Some(filled(&REGION, 5));
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(source.as_ref().unwrap(), &REGION);
    // Its memory is gone before anyone asked: somebody killed the keeper.
    drop(source.take());
    let (program, uffd) = watched(&REGION);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&REGION, image), &[&holder]);
    program.hand(0).start_peek(BASE).unwrap();
    while space.progress().trouble.is_none() {
        std::thread::yield_now();
    }
    assert_eq!(space.progress().pages_left, PAGES);
    assert_eq!(space.progress().pages_zeroed, 0);
    let _: &Puppet = &program;
}
