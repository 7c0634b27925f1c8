//! Explicit huge pages move with what was written to them, where there is room for them.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use std::fs;
use support::obedient::Obedient;
use support::{JOURNEY, Workshop};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// So many huge pages more than there were, until it is dropped.
struct Pool {
    before: u64,
}

impl Pool {
    fn with(more: u64) -> Pool {
        let before = count();
        resize(before + more);
        assert_eq!(count(), before + more, "this kernel gives no huge pages ({COUNT})");
        Pool { before }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        resize(self.before);
    }
}

fn count() -> u64 {
    fs::read_to_string(COUNT).unwrap().trim().parse().unwrap()
}

fn resize(pages: u64) {
    fs::write(COUNT, pages.to_string()).unwrap();
}

#[test]
fn they_keep_what_was_written_and_are_refused_where_there_are_none() {
    let pool = Pool::with(16);
    let (lab, workshop) = (Lab::up("huge", &Options::default()), Workshop::new("huge"));
    let (mut program, _run) = Obedient::start(&lab, &workshop, "one");
    // MAP_PRIVATE, MAP_ANONYMOUS, MAP_HUGETLB
    program.ask("m = mmap.mmap(-1, 6 << 20, flags=0x40022)");
    program.ask("m[5: 10] = b'begin'");
    for (n, node) in JOURNEY.into_iter().enumerate() {
        program.ask(&format!("m[4 << 20: 4 << 20 | 4] = b'{n:4}'"));
        lab.move_verified(program.pid, node);
        assert_eq!(program.ask("m[5: 10]"), "b'begin'", "on {node}");
        assert_eq!(program.ask("m[4 << 20: 4 << 20 | 4]"), format!("b'{n:4}'"), "on {node}");
        assert_eq!(program.ask("m[2 << 20: 2 << 20 | 2]"), "b'\\x00\\x00'", "on {node}");
        program.ask("m.madvise(4, 4 << 20, 2 << 20)"); // MADV_DONTNEED
        assert_eq!(program.ask("m[4 << 20]"), "0", "on {node}");
    }
    assert!(program.ask("open('/proc/self/maps').read().count('anon_hugepage')") == "1");

    program.ask("o = mmap.mmap(-1, 14 << 20, flags=0x40022)");
    let words = refused(&lab, &program);
    assert!(words.contains("16 MiB"), "{words}");
    program.ask("o.close()");
    // What the program has stays in the pool; nobody else finds any.
    resize(0);
    let words = refused(&lab, &program);
    assert!(words.contains("3 of them, and the destination has 0 free"), "{words}");
    assert_eq!(program.ask("m[5: 10]"), "b'begin'");
    drop(pool);
}

fn refused(lab: &Lab, program: &Obedient) -> String {
    match lab.move_as(request(program.pid, "n3")) {
        Err(NotMoved::Refused(obstacles)) => format!("{obstacles:?}"),
        other => panic!("it was not refused: {other:?}"),
    }
}
