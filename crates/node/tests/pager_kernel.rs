//! What the kernel does, where it surprises. Each test documents a behaviour that the pager is built around.

mod pager_rig;

use dunlin_sys::pagemap::{self, Kinds, Query};
use dunlin_sys::puppet::Puppet;
use dunlin_sys::uffd::{Event, Features, Installed, Stop, Uffd, Watch};
use dunlin_sys::vmcopy;
use pager_rig::*;

const REGION: [(u64, u64); 1] = [(BASE, 16)];
const DONTNEED: i32 = 4;

fn stopped(bytes: u64, why: Stop) -> Installed {
    Installed {
        bytes,
        stopped: Some(why),
    }
}

fn all(bytes: u64) -> Installed {
    Installed { bytes, stopped: None }
}

/// The next messages, when there are some.
fn events(uffd: &Uffd) -> Vec<Event> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut events = Vec::new();
    while uffd.read(&mut events).unwrap() == 0 {
        poll(&mut [PollFd::new(uffd, PollFlags::IN)], None).unwrap();
    }
    events
}

fn page_of(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

/// Runs `f` while something else happens in the puppet.
fn meanwhile<T: Send>(f: impl FnOnce() -> T + Send, then: impl FnOnce()) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(f);
        then();
        thread.join().unwrap()
    })
}

#[test]
fn a_child_reads_holes_as_zeros_unless_fork_is_an_event() {
    let puppet = Puppet::new().unwrap();
    let _uffd = watch(&puppet, &REGION, Features::default());
    puppet.hand(0).fork(1).unwrap();
    // Nobody serves a fault, and yet the child goes on: with a page that its parent does not have.
    assert_eq!(puppet.hand(1).peek(BASE).unwrap(), 0);
}

#[test]
fn a_forked_child_has_a_userfaultfd_of_its_own() {
    let (puppet, uffd) = watched(&REGION);
    let mut child = None;
    meanwhile(
        || puppet.hand(0).fork(1).unwrap(),
        || {
            // While the event is unread, nothing can be installed.
            while uffd.zero(BASE, PAGE).unwrap() != stopped(0, Stop::Changing) {}
            for event in events(&uffd) {
                if let Event::Fork { child: it } = event {
                    child = Some(it);
                }
            }
        },
    );
    let child = child.expect("a fork event");
    puppet.hand(1).start_peek(BASE + PAGE).unwrap();
    assert!(matches!(events(&child)[0], Event::Fault { address, .. } if address == BASE + PAGE));
    assert_eq!(child.copy(BASE + PAGE, &page_of(3)).unwrap(), all(PAGE));
    assert_eq!(puppet.hand(1).finish().unwrap(), 0x0303_0303_0303_0303);
    // The parent's page is another one.
    assert_eq!(uffd.copy(BASE + PAGE, &page_of(4)).unwrap(), all(PAGE));
    assert_eq!(puppet.hand(0).peek(BASE + PAGE).unwrap(), 0x0404_0404_0404_0404);
}

#[test]
fn nothing_can_be_installed_while_an_event_is_unread() {
    let (puppet, uffd) = watched(&REGION);
    meanwhile(
        || puppet.hand(0).advise(BASE, 4 * PAGE, DONTNEED).unwrap(),
        || {
            while uffd.copy(BASE + 9 * PAGE, &page_of(1)).unwrap() != stopped(0, Stop::Changing) {
                puppet_page_again(&puppet, &uffd);
            }
            assert!(
                matches!(events(&uffd)[0], Event::Remove { start, end } if (start, end) == (BASE, BASE + 4 * PAGE))
            );
        },
    );
    assert_eq!(uffd.copy(BASE, &page_of(2)).unwrap(), all(PAGE));
}

/// The copy came before the event: it is there now, which is fine too.
fn puppet_page_again(_puppet: &Puppet, uffd: &Uffd) {
    while matches!(uffd.zero(BASE + 9 * PAGE, PAGE).unwrap().stopped, Some(Stop::Exists)) {}
}

#[test]
fn a_move_is_an_event_and_then_the_old_range_is_unmapped() {
    let (puppet, uffd) = watched(&REGION);
    let to = BASE + 0x1000_0000;
    let mut seen = Vec::new();
    meanwhile(
        || {
            puppet
                .hand(0)
                .remap(BASE, 8 * PAGE, 12 * PAGE, Some(to), false)
                .unwrap()
        },
        || {
            while seen.len() < 2 {
                seen.extend(events(&uffd));
            }
        },
    );
    assert!(
        matches!(seen[0], Event::Remap { from, to: t, len } if (from, t, len) == (BASE, to, 8 * PAGE)),
        "{seen:?}"
    );
    assert!(
        matches!(seen[1], Event::Unmap { start, end } if (start, end) == (BASE, BASE + 8 * PAGE)),
        "{seen:?}"
    );
    // What the mapping grew by is watched too, though nobody was told.
    puppet.hand(0).start_peek(to + 11 * PAGE).unwrap();
    assert!(matches!(events(&uffd)[0], Event::Fault { address, .. } if address == to + 11 * PAGE));
    assert_eq!(uffd.zero(to + 11 * PAGE, PAGE).unwrap(), all(PAGE));
    assert_eq!(puppet.hand(0).finish().unwrap(), 0);
}

#[test]
fn a_copy_says_how_far_it_came() {
    let (puppet, uffd) = watched(&REGION);
    assert_eq!(uffd.copy(BASE + 2 * PAGE, &page_of(7)).unwrap(), all(PAGE));
    let four = vec![9; 4 * PAGE as usize];
    // The reason is told only by going on.
    assert_eq!(uffd.copy(BASE, &four).unwrap(), stopped(2 * PAGE, Stop::Changing));
    assert_eq!(
        uffd.copy(BASE + 2 * PAGE, &four[..PAGE as usize]).unwrap(),
        stopped(0, Stop::Exists)
    );
    // Where protections differ there are two mappings, and no copy goes across.
    puppet.hand(0).protect(BASE + 8 * PAGE, 8 * PAGE, 1).unwrap();
    assert_eq!(
        uffd.copy(BASE + 6 * PAGE, &four).unwrap(),
        stopped(0, Stop::NotRegistered)
    );
    assert_eq!(
        uffd.copy(BASE + 6 * PAGE, &four[..2 * PAGE as usize]).unwrap(),
        all(2 * PAGE)
    );
    assert_eq!(
        uffd.copy(BASE + 8 * PAGE, &four[..2 * PAGE as usize]).unwrap(),
        all(2 * PAGE)
    );
    assert_eq!(
        uffd.copy(BASE + 0x1000_0000, &four).unwrap(),
        stopped(0, Stop::NotRegistered)
    );
}

#[test]
fn exec_and_exit_end_the_space_without_a_word() {
    let (puppet, uffd) = watched(&REGION);
    assert!(uffd.is_alive());
    puppet.hand(0).exec().unwrap();
    assert!(!uffd.is_alive());
    assert_eq!(uffd.copy(BASE, &page_of(1)).unwrap(), stopped(0, Stop::Gone));
    let (puppet, uffd) = watched(&REGION);
    puppet.hand(0).exit().unwrap();
    while uffd.is_alive() {}
    assert_eq!(uffd.zero(BASE, PAGE).unwrap(), stopped(0, Stop::Gone));
}

#[test]
fn closing_the_last_userfaultfd_turns_missing_pages_into_zeros() {
    let (puppet, uffd) = watched(&REGION);
    let second = uffd.try_clone().unwrap();
    puppet.hand(0).start_peek(BASE).unwrap();
    drop(uffd);
    // The second holder keeps it alive: the thread waits, and can be served.
    assert!(matches!(events(&second)[0], Event::Fault { address: BASE, .. }));
    drop(second);
    assert_eq!(puppet.hand(0).finish().unwrap(), 0);
}

#[test]
fn files_mapped_privately_cannot_be_watched_for_missing_pages() {
    let puppet = Puppet::new().unwrap();
    let uffd = watch(&puppet, &REGION, Features::CHANGES);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", puppet.pid())).unwrap();
    let file = maps
        .lines()
        .find(|line| line.contains("libc.so.6"))
        .expect("the C library is mapped");
    let start = u64::from_str_radix(file.split('-').next().unwrap(), 16).unwrap();
    assert_eq!(uffd.register(start, PAGE, Watch::MISSING).unwrap_err().errno().0, 22);
}

#[test]
fn poison_is_a_bus_error() {
    let (puppet, uffd) = watched(&REGION);
    puppet.hand(0).start_peek(BASE).unwrap();
    events(&uffd);
    assert_eq!(uffd.poison(BASE, PAGE).unwrap(), all(PAGE));
    uffd.wake(BASE, PAGE).unwrap();
    assert!(puppet.hand(0).finish().is_err());
}

#[test]
fn a_copy_replaces_a_guard_page_but_a_zero_does_not() {
    // MADV_GUARD_INSTALL raises no event: a program that makes a guard of a page that is away loses the guard when
    // the page arrives. Guards that come with the move are safe, for their pages are absent at the source.
    let (puppet, uffd) = watched(&REGION);
    if puppet.hand(0).advise(BASE, 2 * PAGE, 102).is_err() {
        eprintln!("skipped: this kernel has no guard pages (Linux 6.13 has)");
        return;
    }
    assert_eq!(uffd.zero(BASE, PAGE).unwrap(), stopped(0, Stop::Exists));
    assert_eq!(uffd.copy(BASE + PAGE, &page_of(1)).unwrap(), all(PAGE));
    let pagemap = vmcopy::open_pagemap(puppet.pid()).unwrap();
    let content: Vec<bool> = pagemap::entries(&pagemap, BASE, 3)
        .unwrap()
        .map(|e| e.has_content())
        .collect();
    assert_eq!(content, [false, true, false]);
}

#[test]
fn asynchronous_write_protection_finds_what_was_written() {
    let puppet = filled(&REGION, 1);
    let hand = puppet.hand(0);
    let uffd = Uffd::from_fd(hand.userfaultfd().unwrap()).unwrap();
    uffd.negotiate(Features::WP_ASYNC | Features::CHANGES).unwrap();
    uffd.register(BASE, 16 * PAGE, Watch::WRITE_PROTECT).unwrap();
    let pagemap = vmcopy::open_pagemap(puppet.pid()).unwrap();
    let end = BASE + 16 * PAGE;
    let written = || -> Vec<(u64, u64)> {
        let ranges = pagemap::scan(&pagemap, BASE, end, Query::TAKE_WRITTEN);
        ranges
            .map(|r| r.unwrap())
            .map(|r| ((r.start - BASE) / PAGE, (r.end - BASE) / PAGE))
            .collect()
    };
    // Everything counts as written at first; the scan arms what it reports.
    assert_eq!(written(), [(0, 16)]);
    assert_eq!(written(), []);
    hand.poke(BASE + 3 * PAGE, 1).unwrap();
    hand.poke(BASE + 4 * PAGE, 1).unwrap();
    hand.poke(BASE + 15 * PAGE, 1).unwrap();
    hand.peek(BASE + 9 * PAGE).unwrap();
    assert_eq!(written(), [(3, 5), (15, 16)]);
    assert_eq!(written(), []);
    // Dropped is written, too: what is read there now is something else.
    meanwhile(
        || hand.advise(BASE + 7 * PAGE, PAGE, DONTNEED).unwrap(),
        || assert!(matches!(events(&uffd)[0], Event::Remove { .. })),
    );
    let all: Vec<_> = pagemap::scan(
        &pagemap,
        BASE,
        end,
        Query {
            report: Kinds::WRITTEN,
            ..Query::default()
        },
    )
    .collect();
    assert!(!all.is_empty());
}

#[test]
fn a_scan_tells_content_from_nothing() {
    let puppet = Puppet::new().unwrap();
    let hand = puppet.hand(0);
    // More ranges than one call returns.
    let pages = 4000;
    hand.map(BASE, pages * PAGE).unwrap();
    for page in (0..pages).step_by(4) {
        hand.poke(BASE + page * PAGE, 1).unwrap();
        hand.peek(BASE + (page + 2) * PAGE).unwrap();
    }
    let pagemap = vmcopy::open_pagemap(puppet.pid()).unwrap();
    let found: Vec<_> = pagemap::scan(&pagemap, BASE, BASE + pages * PAGE, Query::CONTENT)
        .map(|r| r.unwrap())
        .collect();
    assert_eq!(found.len() as u64, pages / 4);
    assert!(
        found
            .iter()
            .enumerate()
            .all(|(i, r)| r.start == BASE + 4 * i as u64 * PAGE && r.end == r.start + PAGE)
    );
}

#[test]
fn markers_of_write_protection_are_no_content() {
    let puppet = Puppet::new().unwrap();
    let hand = puppet.hand(0);
    hand.map(BASE, 16 * PAGE).unwrap();
    hand.poke(BASE, 1).unwrap();
    let uffd = Uffd::from_fd(hand.userfaultfd().unwrap()).unwrap();
    uffd.negotiate(Features::WP_ASYNC).unwrap();
    uffd.register(BASE, 16 * PAGE, Watch::WRITE_PROTECT).unwrap();
    uffd.write_protect(BASE, 16 * PAGE, true).unwrap();
    let pagemap = vmcopy::open_pagemap(puppet.pid()).unwrap();
    let content: Vec<bool> = pagemap::entries(&pagemap, BASE, 4)
        .unwrap()
        .map(|e| e.has_content())
        .collect();
    assert_eq!(content, [true, false, false, false]);
}

#[test]
fn memory_is_read_through_the_file_and_through_the_task() {
    let puppet = filled(&REGION, 8);
    let mem = vmcopy::open_mem(puppet.pid()).unwrap();
    let (mut a, mut b) = (vec![0; 4 * PAGE as usize], vec![0; 4 * PAGE as usize]);
    vmcopy::read(&mem, BASE, &mut a).unwrap();
    let spans = [
        vmcopy::Span {
            address: BASE,
            len: PAGE as usize,
        },
        vmcopy::Span {
            address: BASE + PAGE,
            len: 3 * PAGE as usize,
        },
    ];
    assert_eq!(vmcopy::gather(puppet.pid(), &spans, &mut b).unwrap(), b.len());
    assert_eq!(a, b);
    // Past protections only the file goes.
    puppet.hand(0).protect(BASE, PAGE, 0).unwrap();
    assert!(vmcopy::gather(puppet.pid(), &spans, &mut b).is_err());
    vmcopy::read(&mem, BASE, &mut b).unwrap();
    assert_eq!(a, b);
}

#[test]
fn a_space_that_is_gone_is_an_error_and_not_an_empty_one() {
    let puppet = filled(&REGION, 8);
    let pagemap = vmcopy::open_pagemap(puppet.pid()).unwrap();
    let mem = vmcopy::open_mem(puppet.pid()).unwrap();
    drop(puppet);
    let scanned: Vec<_> = pagemap::scan(&pagemap, BASE, BASE + PAGE, Query::CONTENT).collect();
    assert_eq!(scanned, [Err(dunlin_sys::Errno(3))]);
    assert!(pagemap::entries(&pagemap, BASE, 1).is_err());
    assert!(vmcopy::read(&mem, BASE, &mut [0; 8]).is_err());
}

#[test]
fn open_files_do_not_keep_the_pages_of_a_process() {
    // Hence the image keeper, which shares the memory.
    let puppet = filled(&REGION, 8);
    let mem = vmcopy::open_mem(puppet.pid()).unwrap();
    let mut before = [0; 8];
    vmcopy::read(&mem, BASE, &mut before).unwrap();
    puppet.hand(0).exec().unwrap();
    assert!(vmcopy::read(&mem, BASE, &mut before).is_err());
}
