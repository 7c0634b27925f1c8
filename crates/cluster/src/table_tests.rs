//! The table of the node with slot 1 of modulus 8, whose PIDs are 105, 113, 121, …

use super::*;

const HERE: Slot = Slot(1);
const OURS: Pid = Pid(105);
const THEIRS: Pid = Pid(106);

fn table() -> Table {
    Table::new(Modulus(8), HERE)
}

fn news(pid: Pid, incarnation: u64, node: u16, ids: &[i32]) -> EntryChange {
    EntryChange {
        pid,
        incarnation: Incarnation(incarnation),
        node: Slot(node),
        ids: ids.iter().copied().map(Pid).collect(),
        homes: BTreeSet::new(),
    }
}

fn changes(reserve: &[i32], release: &[i32]) -> Reservations {
    let pids = |ids: &[i32]| ids.iter().copied().map(Pid).collect();
    Reservations {
        reserve: pids(reserve),
        release: pids(release),
    }
}

#[test]
fn without_an_entry_a_process_is_at_home() {
    let t = table();
    assert_eq!(t.whereabouts(OURS), Whereabouts::Known(Place::At(HERE)));
    assert_eq!(
        t.whereabouts(THEIRS),
        Whereabouts::AskHome {
            home: Slot(2),
            heard: None
        }
    );
    assert_eq!(t.whereabouts(Pid(7)), Whereabouts::EachNodesOwn);
    assert_eq!(t.incarnation(OURS), Incarnation(0));
}

#[test]
fn ids_are_reserved_while_held_elsewhere() {
    let mut t = table();
    // 110 is a thread of another slot: its own home reserves it.
    assert_eq!(t.learn(&news(OURS, 1, 2, &[113, 110])), Ok(changes(&[105, 113], &[])));
    assert_eq!(t.whereabouts(OURS), Whereabouts::Known(Place::At(Slot(2))));
    // On to slot 3; thread 113 has ended, 121 cannot have been made there but may be a group.
    assert_eq!(t.learn(&news(OURS, 2, 3, &[121])), Ok(changes(&[121], &[113])));
    assert_eq!(t.learn(&news(OURS, 3, 1, &[121])), Ok(changes(&[], &[105, 121])));
    assert_eq!(t.entry(OURS).unwrap().moves, 3);
}

#[test]
fn an_id_that_several_hold_is_released_by_the_last() {
    let mut t = table();
    assert_eq!(t.learn(&news(THEIRS, 1, 3, &[113])), Ok(changes(&[113], &[])));
    assert_eq!(t.learn(&news(Pid(107), 1, 3, &[113])), Ok(changes(&[], &[])));
    assert_eq!(t.ended(THEIRS, Incarnation(1)), changes(&[], &[]));
    assert_eq!(t.ended(Pid(107), Incarnation(1)), changes(&[], &[113]));
}

#[test]
fn what_comes_home_is_reserved_until_it_is_resumed() {
    let mut t = table();
    let _ = t.learn(&news(OURS, 1, 2, &[113])).unwrap();
    // The home is the destination: the decision alone puts nothing into the nest.
    assert_eq!(t.commit(&news(OURS, 2, 1, &[113])), Ok(changes(&[], &[])));
    assert_eq!(t.whereabouts(OURS), Whereabouts::Known(Place::At(HERE)));
    assert_eq!(t.learn(&news(OURS, 2, 1, &[113])), Ok(changes(&[], &[105, 113])));
    assert_eq!(t.learn(&news(OURS, 2, 1, &[113])), Ok(changes(&[], &[])));
    // And if it is lost before: released, too.
    let _ = t.learn(&news(OURS, 3, 2, &[])).unwrap();
    let _ = t.commit(&news(OURS, 4, 1, &[])).unwrap();
    assert_eq!(t.ended(OURS, Incarnation(4)), changes(&[], &[105]));
}

#[test]
fn old_news_changes_nothing() {
    let mut t = table();
    let _ = t.learn(&news(OURS, 5, 2, &[])).unwrap();
    let before = t.entry(OURS).cloned();
    for old in [0, 4, 5] {
        assert_eq!(t.learn(&news(OURS, old, 3, &[113])), Ok(changes(&[], &[])));
        assert_eq!(t.entry(OURS), before.as_ref());
    }
}

#[test]
fn a_process_ends_once_whatever_was_known_of_it() {
    let mut t = table();
    let _ = t.learn(&news(OURS, 5, 2, &[])).unwrap();
    // An abort has raised it to 6; the node it ended on had not heard.
    t.raise(OURS, Incarnation(6));
    assert_eq!(t.ended(OURS, Incarnation(5)), changes(&[], &[105]));
    assert_eq!(t.incarnation(OURS), Incarnation(6).after_commit());
    // The end of that life, told again, does not end the next.
    let _ = t.learn(&news(OURS, 1 << 20, 2, &[])).unwrap();
    assert_eq!(t.ended(OURS, Incarnation(5)), changes(&[], &[]));
    assert!(t.entry(OURS).is_some());
}

#[test]
fn late_news_does_not_raise_the_dead() {
    let mut t = table();
    // The end overtakes the news of the move.
    assert_eq!(t.ended(THEIRS, Incarnation(2)), changes(&[], &[]));
    assert_eq!(t.learn(&news(THEIRS, 2, 3, &[113])), Ok(changes(&[], &[])));
    assert_eq!(t.entry(THEIRS), None);
    // The next life of the number starts above the last.
    let _ = t.learn(&news(OURS, 4, 2, &[])).unwrap();
    assert_eq!(t.ended(OURS, Incarnation(4)), changes(&[], &[105]));
    assert_eq!(t.incarnation(OURS), Incarnation(4).after_commit());
}

#[test]
fn a_guest_that_leaves_keeps_an_entry_only_for_what_it_holds() {
    let mut t = table();
    let _ = t.learn(&news(THEIRS, 1, 1, &[])).unwrap();
    assert!(t.entry(THEIRS).is_some(), "it is here");
    let _ = t.learn(&news(THEIRS, 2, 3, &[])).unwrap();
    assert_eq!(t.entry(THEIRS), None, "it took nothing of ours along");
    let _ = t.learn(&news(THEIRS, 3, 1, &[])).unwrap();
    assert_eq!(t.learn(&news(THEIRS, 4, 3, &[113])), Ok(changes(&[113], &[])));
}

#[test]
fn a_lease_ends_once_and_raises_the_incarnation() {
    let mut t = table();
    let move_id = MoveId { source: HERE, nonce: 1 };
    t.lease(OURS, move_id, Slot(2));
    let moving = Place::Moving {
        move_id,
        from: HERE,
        to: Slot(2),
    };
    assert_eq!(t.whereabouts(OURS), Whereabouts::Known(moving));
    let other = MoveId { source: HERE, nonce: 2 };
    assert_eq!(t.unlease(OURS, other), None);
    assert_eq!(t.unlease(OURS, move_id), Some(Incarnation(1)));
    assert_eq!(t.unlease(OURS, move_id), None);
    assert_eq!(t.whereabouts(OURS), Whereabouts::Known(Place::At(HERE)));
}

#[test]
fn a_new_life_ends_the_old_one() {
    let mut t = table();
    let _ = t.learn(&news(OURS, 1, 2, &[])).unwrap();
    let _ = t.learn(&news(OURS, 2, 1, &[113])).unwrap();
    assert_eq!(t.born(OURS), changes(&[], &[]));
    assert_eq!(t.entry(OURS), None);
    assert_eq!(t.incarnation(OURS), Incarnation(2).after_commit());
}

#[test]
fn what_was_made_durable_is_restored() {
    let mut t = table();
    let mut durable = BTreeMap::new();
    let _ = t.learn(&news(OURS, 1, 2, &[113])).unwrap();
    let _ = t.learn(&news(THEIRS, 1, 1, &[])).unwrap();
    let _ = t.learn(&news(Pid(121), 3, 2, &[])).unwrap();
    assert_eq!(t.ended(Pid(121), Incarnation(3)), changes(&[], &[121]));
    for row in t.take_changed() {
        let (Row::Entry(pid, _) | Row::Grave(pid, _) | Row::Absent(pid)) = row;
        durable.insert(pid, row);
    }
    assert!(t.take_changed().is_empty());
    let (restored, reservations) = Table::restore(Modulus(8), HERE, durable.into_values());
    assert_eq!(reservations, [Pid(105), Pid(113)]);
    assert_eq!(restored.entries, t.entries);
    assert_eq!(restored.incarnation(Pid(121)), t.incarnation(Pid(121)));
}

#[test]
fn the_dead_of_other_slots_are_forgotten_in_time() {
    let mut t = table();
    let theirs = |i: usize| Pid(106 + 8 * i as i32);
    for i in 0..=MAX_FOREIGN_GRAVES {
        assert_eq!(t.ended(theirs(i), Incarnation(1)), changes(&[], &[]));
    }
    assert_eq!(t.graves.len(), MAX_FOREIGN_GRAVES);
    assert!(t.take_changed().contains(&Row::Absent(theirs(0))));
}

#[test]
fn a_full_table_takes_no_more_strangers() {
    let mut t = table();
    for i in 0..MAX_FOREIGN_ENTRIES {
        let _ = t.learn(&news(Pid(106 + 8 * i as i32), 1, 1, &[])).unwrap();
    }
    assert_eq!(t.learn(&news(Pid(107), 1, 1, &[])), Err(TableError::Full));
    assert_eq!(t.learn(&news(OURS, 1, 2, &[])), Ok(changes(&[105], &[])));
}
