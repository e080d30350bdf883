//! Expressions from configuration: compiled, printed, and evaluated over a request without attributes.
#![no_main]

use lateen_engine::{AttributeTable, Bag, Expression, Language, Tracker};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static TABLE: AttributeTable = AttributeTable::default_vocabulary();
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    TABLE.with(|table| {
        for language in [Language::Cexl, Language::Cel, Language::Compat] {
            let Ok(expression) = Expression::compile_any(language, text, table) else {
                continue;
            };
            let bag = Bag::new(table);
            let tracked = expression.outcome(&bag, &mut Tracker::new());
            let plain = expression.outcome(&bag, &mut Tracker::off());
            assert_eq!(tracked.is_ok(), plain.is_ok());
            expression.partial(&|_| None);
        }
    });
});
