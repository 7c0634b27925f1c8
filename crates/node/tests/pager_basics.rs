//! Programs run while their pages come from elsewhere, on the real kernel.

mod pager_rig;

use dunlin_node::pager::{Finish, Pager};
use dunlin_sys::puppet::pattern;
use pager_rig::*;

#[test]
fn every_page_arrives_and_then_nothing_is_left_behind() {
    let regions = [(BASE, 1000), (BASE + 0x100_0000, 3), (BASE + 0x200_0000, 4096)];
    let source = filled(&regions, 7);
    let holder = Holder::new(1);
    let (image, unused) = holder.register(&source, &regions);
    let (program, uffd) = watched(&regions);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&regions, image), &[&holder]);
    let hand = program.hand(0);
    for (start, pages) in regions {
        assert_eq!(hand.verify(start, pages * PAGE, 7, 0).unwrap(), None);
    }
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    let progress = space.progress();
    eprintln!("{progress:?}");
    assert_eq!(progress.pages_faulted + progress.pages_pushed, 1000 + 3 + 4096);
    assert_eq!(progress.pages_left, 0);
    // The claim is released, and the program's memory is ordinary memory.
    assert_eq!(unused.recv_timeout(LONG).unwrap(), image);
    assert!(holder.store.status().is_empty());
    hand.advise(BASE, PAGE, 4).unwrap();
    assert_eq!(hand.peek(BASE).unwrap(), 0);
}

#[test]
fn random_access_sees_the_right_bytes() {
    let regions = [(BASE, 2000)];
    let source = filled(&regions, 3);
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &regions);
    let (program, uffd) = watched(&regions);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&regions, image), &[&holder]);
    let hand = program.hand(0);
    for i in 0..500u64 {
        let page = i * 1237 % 2000;
        assert_eq!(
            hand.peek(BASE + page * PAGE).unwrap(),
            pattern(3, page * 512),
            "page {page}"
        );
    }
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    eprintln!("{:?}", space.progress());
}

#[test]
fn what_the_source_never_had_is_zeros() {
    let regions = [(BASE, 512)];
    let source = filled(&[], 0);
    source.hand(0).map(BASE, 512 * PAGE).unwrap();
    for page in (0..512).step_by(7) {
        source.hand(0).poke(BASE + page * PAGE, page + 1).unwrap();
    }
    let holder = Holder::new(1);
    let (image, _unused) = holder.register(&source, &regions);
    let (program, uffd) = watched(&regions);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&regions, image), &[&holder]);
    for page in 0..512 {
        let expected = if page % 7 == 0 { page + 1 } else { 0 };
        assert_eq!(
            program.hand(0).peek(BASE + page * PAGE).unwrap(),
            expected,
            "page {page}"
        );
    }
    assert_eq!(space.wait_finished(LONG), Some(Finish::Drained));
    let progress = space.progress();
    // Absent pages do not travel.
    assert_eq!(progress.pages_faulted + progress.pages_pushed, 512 / 7 + 1);
}
