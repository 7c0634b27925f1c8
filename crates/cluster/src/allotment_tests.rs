//! The allotment against a model nest that knows every id in use.

use super::*;

fn small(limit: i32) -> Allotment {
    Allotment::new(Modulus(8), Slot(5), limit).unwrap()
}

/// Hands out one PID, scanning `used` whenever asked.
fn take(allotment: &mut Allotment, used: &BTreeSet<Pid>) -> Result<Pid, NoPid> {
    loop {
        match allotment.next_pid() {
            Err(NoPid::NeedsScan(window)) => allotment.scanned(window, used.iter().copied()),
            other => return other,
        }
    }
}

#[test]
fn the_first_number_is_above_the_nodes_own() {
    for modulus in 1..=200u16 {
        for slot in 0..modulus {
            let mut a = Allotment::new(Modulus(modulus), Slot(slot), 1000).unwrap();
            let pid = take(&mut a, &BTreeSet::new()).unwrap();
            assert_eq!(Modulus(modulus).home(pid), Some(Slot(slot)));
            assert!(pid.0 - i32::from(modulus) <= LAST_OWN_PID, "{pid} is not the lowest");
            let expected = (101..1000)
                .filter(|p| p % i32::from(modulus) == i32::from(slot))
                .count();
            assert_eq!(a.candidates() as usize, expected);
        }
    }
}

#[test]
fn impossible_allotments_are_refused() {
    let high = Allotment::new(Modulus(8), Slot(8), 1000).unwrap_err();
    assert!(matches!(high, AllotmentError::SlotTooHigh { .. }));
    let none = Allotment::new(Modulus(64), Slot(1), 129).unwrap_err();
    assert!(matches!(none, AllotmentError::NoCandidates { .. }));
    assert_eq!(Allotment::new(Modulus(64), Slot(1), 130).unwrap().candidates(), 1);
}

#[test]
fn a_number_needs_a_scan_and_the_scan_lasts_a_window() {
    let mut a = Allotment::new(Modulus(64), Slot(1), 4 << 20).unwrap();
    let Err(NoPid::NeedsScan(window)) = a.next_pid() else {
        panic!("handed out blindly")
    };
    assert_eq!((window.first, window.last), (Pid(129), Pid(129 + 64 * 1023)));
    a.scanned(window, [Pid(129), Pid(130)]);
    for i in 1..1024 {
        assert_eq!(a.next_pid(), Ok(Pid(129 + 64 * i)));
    }
    assert!(matches!(a.next_pid(), Err(NoPid::NeedsScan(w)) if w.first == Pid(129 + 64 * 1024)));
}

#[test]
fn numbers_wrap_around_and_skip_what_is_in_use() {
    let mut a = small(130); // 101, 109, 117, 125
    let used: BTreeSet<Pid> = [Pid(109), Pid(110)].into();
    let got: Vec<_> = (0..5).map(|_| take(&mut a, &used).unwrap().0).collect();
    assert_eq!(got, [101, 117, 125, 101, 117]);
}

#[test]
fn what_arrives_during_or_after_the_scan_is_not_handed_out() {
    let mut a = small(130);
    let Err(NoPid::NeedsScan(window)) = a.next_pid() else {
        panic!("handed out blindly")
    };
    a.occupy(Pid(101));
    a.scanned(window, []);
    a.occupy(Pid(109));
    assert_eq!(a.next_pid(), Ok(Pid(117)));
}

#[test]
fn a_released_number_waits_for_the_next_scan() {
    let mut a = small(130);
    a.reserve([Pid(109), Pid(110)]);
    assert_eq!(a.reserved().collect::<Vec<_>>(), [Pid(109)]);
    assert_eq!(take(&mut a, &BTreeSet::new()), Ok(Pid(101)));
    a.release([Pid(109), Pid(110)]); // It came back home and holds its number again: only a scan can tell.
    assert_eq!(a.next_pid(), Ok(Pid(117)));
    assert_eq!(a.next_pid(), Ok(Pid(125)));
    assert_eq!(take(&mut a, &[Pid(101)].into()), Ok(Pid(109)));
}

#[test]
fn exhaustion_is_an_answer_and_not_for_ever() {
    let mut a = small(130);
    let mut used: BTreeSet<Pid> = [Pid(101), Pid(109), Pid(125)].into();
    a.reserve([Pid(117)]);
    assert_eq!(take(&mut a, &used), Err(NoPid::Exhausted));
    assert_eq!(take(&mut a, &used), Err(NoPid::Exhausted));
    used.remove(&Pid(109));
    assert_eq!(take(&mut a, &used), Ok(Pid(109)));
    used.insert(Pid(109));
    assert_eq!(take(&mut a, &used), Err(NoPid::Exhausted));
    a.release([Pid(117)]);
    assert_eq!(take(&mut a, &used), Ok(Pid(117)));
}

#[test]
fn a_restarted_allotment_goes_on_where_it_was() {
    let mut a = small(130);
    for (last, next) in [
        (0, 101),
        (101, 109),
        (104, 109),
        (117, 125),
        (125, 101),
        (i32::MAX, 101),
    ] {
        a.resume_after(Pid(last));
        assert_eq!(take(&mut a, &BTreeSet::new()), Ok(Pid(next)), "after {last}");
    }
}

#[test]
fn the_end_of_the_number_space_does_not_overflow() {
    let mut a = Allotment::new(Modulus(1024), Slot(1023), i32::MAX).unwrap();
    a.resume_after(Pid(i32::MAX - 2048));
    let got: Vec<_> = (0..3).map(|_| take(&mut a, &BTreeSet::new()).unwrap().0).collect();
    assert_eq!(got, [i32::MAX - 1024, 1023, 2047]);
}

/// A nest at random: tasks come, go, leave group ids behind, depart (reserved) and come back.
#[test]
fn no_number_is_ever_given_twice() {
    for seed in 0..3000u64 {
        let mut rng = Rng(seed);
        let modulus = Modulus([1, 2, 7, 64][rng.below(4)]);
        let slot = Slot(rng.below(usize::from(modulus.0)) as u16);
        let ring = 1 + rng.below(12) as i32;
        let limit = LAST_OWN_PID + 1 + ring * i32::from(modulus.0);
        let mut a = Allotment::new(modulus, slot, limit).unwrap();
        let all: Vec<Pid> = (101..limit)
            .map(Pid)
            .filter(|p| modulus.home(*p) == Some(slot))
            .collect();
        let (mut used, mut away) = (BTreeSet::<Pid>::new(), BTreeSet::<Pid>::new());
        let mut slow_scan = None::<BTreeSet<Pid>>;
        for step in 0..200 {
            let at = format!("seed {seed} step {step}");
            match rng.below(6) {
                0..=2 => match a.next_pid() {
                    Ok(pid) => {
                        assert!(all.contains(&pid), "{at}: {pid} is not ours");
                        assert!(!away.contains(&pid), "{at}: {pid} is reserved");
                        assert!(used.insert(pid), "{at}: {pid} is in use");
                    }
                    Err(NoPid::NeedsScan(window)) => match slow_scan.take() {
                        // Half of the scans end at once; the others miss what happens before the next question.
                        None if rng.below(2) == 0 => slow_scan = Some(used.clone()),
                        None => a.scanned(window, used.iter().copied()),
                        Some(seen) => a.scanned(window, seen),
                    },
                    Err(NoPid::Exhausted) => {}
                },
                3 => used.retain(|_| rng.below(3) != 0),
                4 => {
                    if let Some(pid) = used.iter().copied().nth(rng.below(used.len().max(1))) {
                        a.reserve([pid]);
                        away.insert(pid);
                        used.remove(&pid);
                    }
                }
                _ => {
                    if let Some(pid) = away.iter().copied().nth(rng.below(away.len().max(1))) {
                        away.remove(&pid);
                        if rng.below(2) == 0 {
                            used.insert(pid);
                        }
                        a.release([pid]);
                    }
                }
            }
        }
        // With nothing changing, what is free is found and what is not is reported.
        let free = all.iter().any(|p| !used.contains(p) && !away.contains(p));
        a.resume_after(Pid(0));
        assert_eq!(take(&mut a, &used).is_ok(), free, "seed {seed}");
    }
}

struct Rng(u64);

impl Rng {
    /// SplitMix64.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
