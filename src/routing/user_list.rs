//! Lists of user ids with exact membership, for lists of tens of millions.
//!
//! A list is built once from the bytes of its file and then only asked. Ids are compared byte by
//! byte: `007` is not `7` and `Ann` is not `ann`. Which id a request carries, where the file lies
//! and when it is read again are the concern of others; nothing here touches a file or a clock.
//!
//! Each id lives in one of two places, chosen by what the list holds:
//!
//! * **Text**: the bytes of the file itself, packed in place, and a hash table of `u32` offsets
//!   into them. That is the id, a separator, and 5.7 to 11.4 bytes of table (which has a power of
//!   two of slots, of 5 bytes).
//! * **Numbers**: all canonical decimal `u64`s in a roaring bitmap, from an eighth of a byte for an
//!   id of a dense range to a few bytes for one of a wide range. Random 64-bit numbers would take
//!   more there than as text, and stay text.

use std::fmt;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use memchr::memchr_iter;
use roaring::RoaringTreemap;
use xxhash_rust::xxh3::xxh3_64;

use self::packing::{Packing, line_at};

mod format;
mod packing;

pub use self::format::{Format, ListError, no_text};

/// A set of user ids which answers exactly, and never changes once built.
pub struct UserList {
    text: TextIds,
    numbers: Option<NumberIds>,
}

/// Ids as bytes: an arena, and the place of each id in it.
struct TextIds {
    /// The ids, separated by `\n`, which no id contains.
    arena: Vec<u8>,
    starts: HashTable<u32>,
}

/// All ids of the list which are canonical decimal numbers; what is not here is not in the list.
struct NumberIds {
    bitmap: RoaringTreemap,
    heap_bytes: usize,
}

/// Called between two parts of the work.
pub type Pause<'p> = &'p mut dyn FnMut();

// === impl UserList ===

impl UserList {
    /// The largest file that is read, in bytes.
    pub const LARGEST_FILE: u64 = 16 << 30;

    /// Builds the list from the content of its file.
    ///
    /// The content becomes the list's own memory where the format allows it, hence it is taken by
    /// value.
    ///
    /// # Errors
    ///
    /// The first thing in the file which cannot be read as ids; a list is used whole or not at all.
    pub fn parse(content: Vec<u8>, format: &Format) -> Result<Self, ListError> {
        Self::parse_with_pauses(content, format, &mut || ())
    }

    /// As [`parse`](Self::parse), with a pause now and then, so that a list of millions of ids does
    /// not keep a core from others for long at a time.
    ///
    /// # Errors
    ///
    /// As `parse`.
    pub fn parse_with_pauses(
        content: Vec<u8>,
        format: &Format,
        pause: Pause<'_>,
    ) -> Result<Self, ListError> {
        let ids = format::read_ids(content, format, pause)?;
        let numbers = NumberIds::if_much_smaller(&ids);
        let text_ids = if numbers.is_some() {
            without_numbers(ids, pause)
        } else {
            ids
        };
        Ok(Self {
            text: TextIds::build(text_ids, pause)?,
            numbers,
        })
    }

    /// Whether `id` is in the list, byte for byte.
    pub fn contains(&self, id: &str) -> bool {
        let id = id.as_bytes();
        if let Some(numbers) = &self.numbers
            && let Some(number) = canonical_number(id)
        {
            return numbers.bitmap.contains(number);
        }
        self.text.contains(id)
    }

    /// The number of distinct ids.
    pub fn len(&self) -> usize {
        self.text.starts.len() + self.numbers.as_ref().map_or(0, NumberIds::len)
    }

    /// Whether the list has no id at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory which the list holds, in bytes; of a bitmap a close estimate.
    pub fn heap_bytes(&self) -> usize {
        let numbers = self
            .numbers
            .as_ref()
            .map_or(0, |numbers| numbers.heap_bytes);
        self.text.arena.capacity() + self.text.starts.allocation_size() + numbers
    }
}

/// Shows counts only: ids of users do not belong into logs.
impl fmt::Debug for UserList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserList")
            .field("text", &self.text.starts.len())
            .field("numbers", &self.numbers.as_ref().map_or(0, NumberIds::len))
            .field("heap_bytes", &self.heap_bytes())
            .finish()
    }
}

// === impl TextIds ===

impl TextIds {
    /// Builds the set of `ids` within their own memory.
    fn build(ids: Vec<u8>, pause: Pause<'_>) -> Result<Self, ListError> {
        // Sized beforehand, so that the table never moves and is not twice as large as it must be.
        let mut starts = HashTable::with_capacity(count(&ids));
        let mut packing = Packing::new(ids, 0, pause);
        while let Some(range) = packing.next_line() {
            let id = packing.bytes(&range);
            let packed = packing.packed();
            let is_id = |start: &u32| id_at(packed, *start) == id;
            let hash_of = |start: &u32| xxh3_64(id_at(packed, *start));
            if let Entry::Vacant(vacant) = starts.entry(xxh3_64(id), is_id, hash_of) {
                vacant.insert(offset(packing.keep(range))?);
            }
        }
        let mut arena = packing.finish();
        arena.shrink_to_fit();
        // Does something only if most lines were duplicates.
        starts.shrink_to_fit(|start| xxh3_64(id_at(&arena, *start)));
        Ok(Self { arena, starts })
    }

    fn contains(&self, id: &[u8]) -> bool {
        // Whole lines are compared, so neither a part of an id nor two ids with the `\n` between
        // them can match.
        self.starts
            .find(xxh3_64(id), |start| id_at(&self.arena, *start) == id)
            .is_some()
    }
}

/// The place of an id as the table stores it: 32 bits, for half the table of 64.
fn offset(position: usize) -> Result<u32, ListError> {
    u32::try_from(position).map_err(|_| {
        ListError::whole_file(
            "the list holds more than 4 GiB of text ids; split it in two".to_owned(),
        )
    })
}

fn id_at(arena: &[u8], start: u32) -> &[u8] {
    line_at(arena, start as usize)
}

/// The number of ids in a buffer of them, duplicates included.
fn count(ids: &[u8]) -> usize {
    if ids.is_empty() {
        0
    } else {
        memchr_iter(b'\n', ids).count() + 1
    }
}

// === impl NumberIds ===

impl NumberIds {
    /// The numbers among `ids`, if the bitmap of them takes less than half of what they take as
    /// text.
    ///
    /// Half, since a bitmap of many small containers is also slower to search than text, up to
    /// three times.
    fn if_much_smaller(ids: &[u8]) -> Option<Self> {
        // An upper bound: pages of it which stay untouched cost nothing.
        let mut numbers = Vec::with_capacity(count(ids));
        let mut text_bytes = 0;
        for id in ids.split(|byte| *byte == b'\n') {
            if let Some(number) = canonical_number(id) {
                numbers.push(number);
                text_bytes += id.len() + TEXT_OVERHEAD;
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        let heap_bytes = bitmap_bytes(&numbers);
        if heap_bytes * 2 >= text_bytes {
            return None;
        }
        // Sorted and distinct as they are, the error cannot occur; and text would be right as well.
        let bitmap = RoaringTreemap::from_sorted_iter(numbers).ok()?;
        Some(Self { bitmap, heap_bytes })
    }

    fn len(&self) -> usize {
        usize::try_from(self.bitmap.len()).unwrap_or(usize::MAX)
    }
}

/// The ids which are not numbers, in the same memory.
fn without_numbers(ids: Vec<u8>, pause: Pause<'_>) -> Vec<u8> {
    let mut packing = Packing::new(ids, 0, pause);
    while let Some(range) = packing.next_line() {
        if canonical_number(packing.bytes(&range)).is_none() {
            packing.keep(range);
        }
    }
    packing.finish()
}

/// What a text id takes besides its bytes: the separator and its share of the table, on average.
const TEXT_OVERHEAD: usize = 1 + 8;

/// The memory of a roaring bitmap of `numbers`, which are sorted.
///
/// After roaring 0.11: a B-tree of bitmaps by the high 32 bits; in each a vector of containers by
/// the next 16; in each container a vector of `u16`, or beyond 4,096 of them a bit set of 8 KiB.
/// Vectors grow by doubling, from 4 on.
fn bitmap_bytes(numbers: &[u64]) -> usize {
    const TREE_ENTRY: usize = 56;
    const CONTAINER: usize = 32;
    const ALLOCATION: usize = 8;
    let container = |numbers: &[u64]| match numbers.len() {
        count @ ..=4096 => ALLOCATION + 2 * count.next_power_of_two().max(4),
        _ => ALLOCATION + 8192,
    };
    numbers
        .chunk_by(|a, b| a >> 32 == b >> 32)
        .map(|bitmap| {
            let sizes = bitmap.chunk_by(|a, b| a >> 16 == b >> 16).map(container);
            let (count, bytes) =
                sizes.fold((0_usize, 0), |(count, sum), size| (count + 1, sum + size));
            TREE_ENTRY + ALLOCATION + CONTAINER * count.next_power_of_two().max(4) + bytes
        })
        .sum()
}

/// The number which `id` is, if `id` is the one way to write it: no sign, no leading zero, at most
/// 64 bits.
fn canonical_number(id: &[u8]) -> Option<u64> {
    match id {
        [] | [b'0', _, ..] => None,
        _ => id.iter().try_fold(0_u64, |number, byte| {
            let digit = byte.is_ascii_digit().then(|| byte - b'0')?;
            number.checked_mul(10)?.checked_add(u64::from(digit))
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn lines(content: impl AsRef<[u8]>) -> UserList {
        UserList::parse(content.as_ref().to_vec(), &Format::Lines).unwrap()
    }

    /// Ids which are close to each other, so that some of them meet by chance.
    fn id() -> impl Strategy<Value = String> {
        prop_oneof![
            (0..300_u64).prop_map(|n| n.to_string()),
            (0..300_u64).prop_map(|n| format!("{n:04}")),
            any::<u64>().prop_map(|n| n.to_string()),
            "[a-c]{1,3}",
            "[a-z#@ é名😀]{0,6}[a-zé名😀]",
            Just("18446744073709551616".to_owned()),
        ]
        .prop_map(|id| id.trim_ascii().to_owned())
        .prop_filter("a comment is no id", |id| !id.starts_with('#'))
    }

    proptest! {
        #[test]
        fn answers_as_a_set_does(
            ids in prop::collection::vec(id(), 0..200),
            dense in 0..2_000_u64,
            others in prop::collection::vec(id(), 50),
        ) {
            let mut all = ids;
            all.extend((0..dense).map(|n| (7 * n).to_string()));
            let model: HashSet<&str> = all.iter().map(String::as_str).collect();
            let list = lines(all.join("\n"));
            prop_assert_eq!(list.len(), model.len());
            for id in all.iter().chain(&others) {
                prop_assert_eq!(list.contains(id), model.contains(id.as_str()), "{:?}", id);
                for near in [format!("{id}\n"), format!("0{id}"), format!("{id}0"), format!("+{id}"), format!(" {id}")] {
                    prop_assert_eq!(list.contains(&near), model.contains(near.as_str()), "{:?}", near);
                }
            }
        }

        #[test]
        fn never_panics(content in any::<Vec<u8>>(), text in "[\\[\\]{}\":,#a1\u{0}\r\n \u{FEFF}é]{0,40}") {
            let formats = [
                Format::Lines,
                Format::Csv { column: "a".to_owned() },
                Format::Json { field: None },
                Format::Json { field: Some("a".to_owned()) },
            ];
            for format in &formats {
                let _ = UserList::parse(content.clone(), format);
                let _ = UserList::parse(text.clone().into_bytes(), format);
            }
        }
    }

    #[test]
    fn neighbours_and_parts_of_ids_are_not_members() {
        let list = lines("ann\nanna\nbob\n");
        for id in [
            "",
            "an",
            "nn",
            "nna",
            "ann\n",
            "ann\nanna",
            "anna\nbob",
            "\n",
            "bob\n",
            "Ann",
            "bo",
        ] {
            assert!(!list.contains(id), "{id:?}");
        }
        assert!(list.contains("ann") && list.contains("anna") && list.contains("bob"));
    }

    #[test]
    fn dense_numbers_go_to_the_bitmap_and_the_rest_stays_text() {
        let mut content: String = (0..10_000).rev().map(|n| format!("{n}\n")).collect();
        content.push_str("007\nann\n7\n+8\n18446744073709551616\n");
        let list = lines(content);
        assert_eq!(list.numbers.as_ref().map(NumberIds::len), Some(10_000));
        assert_eq!(list.text.starts.len(), 4);
        assert!(list.heap_bytes() < 20_000);
        for id in ["0", "7", "007", "9999", "ann", "+8", "18446744073709551616"] {
            assert!(list.contains(id), "{id}");
        }
        for id in [
            "07",
            "+7",
            "00",
            "10000",
            "-1",
            "7 ",
            "18446744073709551615",
            "18446744073709551617",
        ] {
            assert!(!list.contains(id), "{id}");
        }
    }

    #[test]
    fn sparse_numbers_stay_text() {
        let sparse = |n: u64| n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_string();
        let list = lines((0..10_000).map(|n| sparse(n) + "\n").collect::<String>());
        assert!(list.numbers.is_none());
        assert!((0..10_000).all(|n| list.contains(&sparse(n))));
        assert!(!list.contains(&sparse(10_000)));
    }

    #[test]
    fn duplicates_count_once_and_give_their_memory_back() {
        let list = lines("ann\nbob\n12\n".repeat(10_000));
        assert_eq!(list.len(), 3);
        assert!(list.heap_bytes() < 1_000, "{}", list.heap_bytes());
    }

    #[test]
    fn an_empty_list_has_no_members() {
        for content in ["", "\n", "\u{FEFF}", "# nobody yet\r\n\r\n", " \t\n"] {
            let list = lines(content);
            assert!(
                list.is_empty() && !list.contains("") && !list.contains("0"),
                "{content:?}"
            );
        }
    }

    #[test]
    fn text_beyond_32_bits_is_an_error() {
        assert_eq!(offset(u32::MAX as usize), Ok(u32::MAX));
        assert!(
            offset(u32::MAX as usize + 1)
                .unwrap_err()
                .to_string()
                .contains("4 GiB")
        );
    }

    #[test]
    fn a_list_can_be_shared_and_its_debug_output_shows_no_id() {
        fn shared<T: Send + Sync>(_: &T) {}
        let list = lines("ann");
        shared(&list);
        let shown = format!("{list:?}");
        assert!(
            shown.contains("text: 1") && !shown.contains("ann"),
            "{shown}"
        );
    }
}
